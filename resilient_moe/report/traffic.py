"""What passed between ranks: healing, embeddings, KV checkpoints.

All of it counts where the sender still lived to say so: what a lost rank had
sent is in no event.
"""

from resilient_moe.report import stalls as stalls_lib
from resilient_moe.report.history import Event, of_kind


def healing_times(events: list[Event]) -> list[float | None]:
  """By fault, until the first embeddings that it cost were had elsewhere.

  None: no attention rank had to ask somebody else.
  """
  faults = of_kind(events, "fault")
  healed = of_kind(events, "healed")
  found: list[float | None] = []
  for number, fault in enumerate(faults):
    owed = set(fault["ranks"])
    # The same rank may be lost again, and healed from again.
    later = (f["t"] for f in faults[number + 1 :] if owed & set(f["ranks"]))
    until_s = next(later, None)
    times = [
        each["t"] - fault["t"]
        for each in healed
        if each["rank"] in owed and each["t"] >= fault["t"]
        if until_s is None or each["t"] < until_s
    ]
    found.append(min(times, default=None))
  return found


def traffic_metrics(events: list[Event]) -> dict[str, float | int | None]:
  """Columns of a table; None where a history has no such event.

  Returns:
    `healed_s`: from a fault to the first embeddings that were computed
    elsewhere than asked for; the median over the faults that had any.
    `exchange_bytes`: embeddings, sent and returned. `checkpoint_bytes`: KV
    streamed away. `checkpoint_ratio`: of checkpoints to embeddings. A restarted
    engine counts again, and its bytes come on top.
  """
  exchanges = of_kind(events, "exchange")
  checkpoints = of_kind(events, "checkpoint")
  moved = sum(e["sent_bytes"] + e["returned_bytes"] for e in exchanges)
  saved = sum(e["bytes_total"] for e in checkpoints)
  healed = [s for s in healing_times(events) if s is not None]
  return {
      "healed_s": stalls_lib.median(healed),
      "exchange_bytes": moved if exchanges else None,
      "checkpoint_bytes": saved if checkpoints else None,
      "checkpoint_ratio": saved / moved if checkpoints and moved else None,
  }
