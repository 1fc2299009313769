"""How wrong the fleet study's closed form is: against stepping, where both can.

  python -m experiments.fleet_check --workdir=DIR [--ranks=8,16] \
      [--seeds=0,1,2,3,4] [--policies=mesh_shrink,kv_restore,restart_cached]

The same requests and the same lost rank, once through the simulated runtime
(every step, `sim.run`), once through the closed form (`sim.fleet_group`), over
the same cost model, after a time in which the group fills up: tokens made
within the window, requests that decode when the rank is lost, the mean gap
between the tokens of a request, waits for the first token, the stall of the
fault, and tokens a second when there is always more to do. A seed draws the
requests. DIR gets `closed_form.md` (medians and ranges over seeds) and `.csv`
(every seed).
"""

import csv
import dataclasses
import io
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from resilient_moe import recovery
from resilient_moe.faults import Fault
from resilient_moe.report import Recorder
from resilient_moe.report.runs import write_text
from resilient_moe.report.table import grid, short
from resilient_moe.serving.request import Request
from resilient_moe.sim import arrivals, fleet
from resilient_moe.sim.case import ModelFacts, SimulatedCase
from resilient_moe.sim.clock import VirtualClock
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.devices import device
from resilient_moe.sim.failure_rates import failure_model
from resilient_moe.sim.fleet_faults import Strike
from resilient_moe.sim.fleet_group import Group
from resilient_moe.sim.fleet_queue import Demand
from resilient_moe.sim.fleet_service import prompt_steps
from resilient_moe.sim.fleet_setting import (
  Memory,
  Setting,
  Shape,
  Template,
  template,
)
from resilient_moe.sim.roofline_timing import RooflineTiming
from resilient_moe.sim.run import Run
from resilient_moe.sim.shapes import shape

MODEL, DEVICE = "qwen3-235b-a22b", "h200"  # slow steps: there are fewer
KWARGS: dict[str, dict[str, Any]] = {"kv_restore": {"replicas": 0}}  # it fits
POLICIES = ("mesh_shrink", "kv_restore", "restart_cached")
UTILISATIONS = (0.4, 0.8)
START_S = 3000.0  # engines have started, meshes are ready
WARM_S = 120.0  # after that the group is as full as it will be
FAULT_S = WARM_S + 60.0
END_S = WARM_S + 120.0
DETECT_S = 1.0
CHUNK = 512
ROWS = 8  # of a rank: few, so that stepping ends
SLO_S = 5.0


@dataclasses.dataclass(frozen=True)
class Numbers:
  """What both ways say of one run."""

  tokens: float  # made from WARM_S to END_S
  decoding: float  # requests, at the fault
  gap_s: float  # mean, between tokens of a request, before the fault
  ttft_p50_s: float
  ttft_p90_s: float
  in_time: float  # part of the requests whose first token came in time
  stall_s: float  # of the fault


class _Steps(Recorder):
  """Keeps when which request had a token; and when it came."""

  def __init__(self, clock: VirtualClock) -> None:
    super().__init__(clock.now)
    self.times: dict[str, list[float]] = {}
    self.came: dict[str, float] = {}
    self.fault_s = 0.0

  def write(self, event: str, t: float | None = None, **fields: Any) -> None:
    at = self.now_s() if t is None else t
    if event == "step":
      for name, _, _ in fields["emitted"]:
        self.times.setdefault(name, []).append(at)
    elif event == "accepted":
      self.came[fields["request_id"]] = at
    elif event == "fault":
      self.fault_s = at

  def _record(self, line: str) -> None:
    """Nothing else is kept."""


@dataclasses.dataclass(frozen=True)
class Setup:
  """One comparison."""

  policy: recovery.RecoveryPolicy
  ranks: int
  costs: Roofline
  load: arrivals.Load
  prepared: Template
  rows: int  # that the policy prepared from
  of: fleet.Study


def setup(name: str, ranks: int, load: arrivals.Load) -> Setup:
  """A group on one node."""
  model, hardware = shape(MODEL), device(DEVICE)
  costs = Roofline(hardware, model, chunk=CHUNK)
  of = fleet.Study(
    model=fleet.Model(
      model.n_experts, model.top_k, model.expert_bytes, model.token_kv_bytes
    ),
    memory=Memory(float(hardware.memory_bytes), float(model.dense_bytes)),
    shape=Shape(4096.0, CHUNK, ROWS, 10.0),
    failures=failure_model("never"),
    groups=1,
    ranks=ranks,
    devices_per_host=ranks,
    detect_s=DETECT_S,
  )
  policy = recovery.load(name, **KWARGS.get(name, {}))
  prepared = template(
    fleet.bare(of, policy.spares), policy, costs, load, of.memory, of.shape
  )
  rows = next(
    n
    for n in range(ROWS, 0, -1)
    if _rows(of, policy, n) <= prepared.view.rows_per_rank
  )
  return Setup(policy, ranks, costs, load, prepared, rows, of)


def _rows(of: fleet.Study, policy: recovery.RecoveryPolicy, n: int) -> int:
  view = dataclasses.replace(fleet.bare(of, policy.spares), rows_per_rank=n)
  return policy.prepare(view).rows_per_rank


def stepped(made: Setup, drawn: arrivals.Arrivals, fault: bool) -> _Steps:
  """Every step of the serving loop, in virtual time."""
  model = shape(MODEL)
  facts = ModelFacts(
    vocab_size=model.vocab_size,
    n_experts=model.n_experts,
    top_k=model.top_k,
    moe_layers=model.moe_layers,
    expert_bytes=model.expert_bytes,
    dense_bytes=model.dense_bytes,
    token_kv_bytes=model.token_kv_bytes,
    embedding_bytes=model.d_model * 2,
  )
  longest = int((drawn.context + drawn.generated).max()) + 1
  requests = tuple(
    Request(
      f"q{i:05d}", (1,) * int(c), int(g), arrival_step=None,
      arrival_s=START_S + float(t),
    )
    for i, (t, c, g) in enumerate(
      zip(drawn.arrival_s, drawn.context, drawn.generated, strict=True)
    )
  )  # fmt: skip
  case = SimulatedCase(
    name=made.policy.name, policy=made.policy, scenario="check", seed=0,
    deployment="collocated", ranks=made.ranks, attention=0, model=facts,
    rows=made.rows, chunk=CHUNK, max_len=longest, cache_len=longest,
    requests=requests, wait_ready=False,
    faults=(Fault("rank_lost", (3,), at_s=START_S + FAULT_S),) if fault else (),
  )  # fmt: skip
  clock = VirtualClock()
  history = _Steps(clock)
  timing = RooflineTiming(
    made.costs, "check", detect=DETECT_S, plan=0.0, turn_s=0.0
  )
  Run(case, timing, clock, history).run()
  return history


def measured(history: _Steps, fault: bool) -> Numbers:
  """The numbers of a stepped run."""
  from_s, fault_s, end_s = (START_S + t for t in (WARM_S, FAULT_S, END_S))
  tokens = sum(
    from_s < t <= end_s for each in history.times.values() for t in each
  )
  gaps = [
    gap
    for each in history.times.values()
    for gap in np.diff([t for t in each if from_s <= t <= fault_s]).tolist()
  ]
  first = {n: each[0] - history.came[n] for n, each in history.times.items()}
  decoding = sum(
    each[0] <= fault_s < each[-1] for each in history.times.values()
  )
  stalls = []
  for each in history.times.values():
    before = [t for t in each if t <= history.fault_s]
    after = [t for t in each if t > history.fault_s]
    if fault and before and after:
      stalls.append(after[0] - history.fault_s)
  waits = np.array(list(first.values()))
  return Numbers(
    float(tokens), float(decoding), float(np.mean(gaps)),
    float(np.median(waits)), float(np.quantile(waits, 0.9)),
    float((waits <= SLO_S).mean()),
    float(np.median(stalls)) if stalls else 0.0,
  )  # fmt: skip


def closed(made: Setup, drawn: arrivals.Arrivals, fault: bool) -> Numbers:
  """The fleet study's way, for the same minutes and lengths."""
  load, prepared = made.load, made.prepared
  minutes = np.bincount((drawn.arrival_s // 60).astype(int))
  # Behind the last arrival the queue runs dry.
  rates = np.concatenate([minutes / 60, np.zeros(60)])
  service = prepared.service
  running = service.running(float(minutes.mean() / 60))
  prefill_s = service.first_token_s(running, prompt_steps(load, CHUNK))
  demand = Demand(rates, SLO_S - prefill_s, 1e9, 1e9)
  setting = Setting(
    made.policy, recovery.load("restart_cached"), made.costs, load,
    made.of.memory, made.of.shape, demand, DETECT_S, 60.0,
  )  # fmt: skip

  def run(until_s: float) -> Any:
    group = Group(setting, prepared, 0, np.random.default_rng(0))
    strikes = [Strike(FAULT_S, "device", (3,), (1e9,))] if fault else []
    return group.run(strikes, [], until_s)

  warm, window = run(WARM_S), run(END_S)
  whole = run(60.0 * len(rates))
  at = int(FAULT_S // 60)
  early = service.running(float(minutes[at - 1] / 60))
  now = service.running(float(minutes[at] / 60))
  counts = whole.counts
  own_s = service.first_token_s(running, np.ceil(load.context / CHUNK))
  came = drawn.arrival_s
  lengths = drawn.generated[(came > WARM_S) & (came <= END_S)]
  return Numbers(
    (window.counts.started - warm.counts.started) * float(lengths.mean()),
    now * service.ranks,
    service.step_at(early),
    counts.wait_s(0.5, own_s),
    counts.wait_s(0.9, own_s),
    counts.in_time / counts.started,
    fleet.weighted(whole.stalls, 0.5) or 0.0,
  )


def saturated(made: Setup, drawn: arrivals.Arrivals) -> tuple[float, float]:
  """Tokens a second with everything there at once: stepped, closed."""
  n = min(len(drawn.arrival_s), 8 * made.ranks * ROWS)
  many = arrivals.Arrivals(
    np.zeros(n), drawn.context[:n], drawn.generated[:n]
  )
  history = stepped(made, many, False)
  times = np.sort(
    np.array([t for each in history.times.values() for t in each])
  )
  # While all rows are full: between a fifth and a half of the tokens.
  low, high = len(times) // 5, len(times) // 2
  rate = (high - low) / (times[high] - times[low])
  capacity = made.prepared.service.capacity * made.load.generated_mean
  return float(rate), capacity


def compare(
  name: str, ranks: int, utilisation: float, seed: int
) -> dict[str, Any]:
  """One row: both numbers of each column."""
  of = arrivals.statistics("conv")
  rng = np.random.default_rng([seed, ranks])
  context, generated = arrivals.draw_lengths(of, 4096, rng)
  load = arrivals.Load("conv", np.ones(1), context, generated)
  made = setup(name, ranks, load)
  rate = utilisation * made.prepared.service.capacity
  drawn = arrivals.generate(of, END_S, rng, rate)
  # The lengths of those who came, not of those who could have come.
  made = setup(
    name, ranks, arrivals.Load("conv", np.ones(1), drawn.context,
                               drawn.generated),
  )  # fmt: skip
  steps = measured(stepped(made, drawn, True), True)
  form = closed(made, drawn, True)
  row: dict[str, Any] = {
    "policy": name, "ranks": ranks, "utilisation": utilisation, "seed": seed,
    "requests": len(drawn.arrival_s),
  }  # fmt: skip
  for field in dataclasses.fields(Numbers):
    row[field.name] = (getattr(steps, field.name), getattr(form, field.name))
  if utilisation == max(UTILISATIONS) and name == POLICIES[0]:
    row["saturated_tokens_per_s"] = saturated(made, drawn)
  return row


def to_tables(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
  """Markdown over seeds, and a CSV of all; errors: of closed over stepped."""
  keys = ["policy", "ranks", "utilisation"]
  pairs = [f.name for f in dataclasses.fields(Numbers)]
  pairs.append("saturated_tokens_per_s")
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  names = [f"{p}_{kind}" for p in pairs for kind in ("stepped", "closed")]
  writer.writerow([*keys, "seed", "requests", *names])
  cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
  for row in rows:
    found = [row.get(name, ("", "")) for name in pairs]
    plain = [row[k] for k in (*keys, "seed", "requests")]
    writer.writerow([*plain, *(v for pair in found for v in pair)])
    cases.setdefault(tuple(row[k] for k in keys), []).append(row)
  body = [
    [*map(str, case), str(len(mine)), *(_cell(mine, name) for name in pairs)]
    for case, mine in cases.items()
  ]
  table = grid([*keys, "seeds", *pairs], body)
  note = (
    f"Stepped / closed form (error). {MODEL} on {DEVICE}, drawn Azure `conv` "
    f"requests of {END_S:g} s, rank 3 lost after {FAULT_S:g} s, reported "
    f"{DETECT_S:g} s later; tokens from {WARM_S:g} s on. Medians over seeds, "
    "of errors also the range."
  )
  text = f"### Closed form against stepping\n\n{table}\n{note}\n"
  return text, out.getvalue()


def _cell(rows: Sequence[dict[str, Any]], name: str) -> str:
  """Medians of both ways, and of the error with its range."""
  found = [row[name] for row in rows if name in row]
  if not found:
    return "-"
  errors = [100 * (said / seen - 1) if seen else 0.0 for seen, said in found]
  middle = " / ".join(
    short(float(np.median(each))) for each in zip(*found, strict=True)
  )
  text = f"{middle} ({np.median(errors):+.1f}%"
  if len(errors) > 1:
    text += f" [{min(errors):+.1f}, {max(errors):+.1f}]"
  return f"{text})"


def launch(argv: Sequence[str]) -> int:
  """Compares, prints and writes the tables; the exit status."""
  given = dict(arg.lstrip("-").partition("=")[::2] for arg in argv[1:])
  flags = ("workdir", "ranks", "seeds", "policies")
  unknown = set(given) - set(flags)
  try:
    if unknown or not given.get("workdir"):
      raise ValueError(
        f"{sorted(unknown) or 'no --workdir'}; flags: --workdir=DIR, "
        "--ranks=8,16, --seeds=0,1, --policies=mesh_shrink"
      )
    ranks, seeds = (
      [int(each) for each in given.get(name, default).split(",")]
      for name, default in (("ranks", "8,16"), ("seeds", "0,1,2,3,4"))
    )
    policies = given.get("policies", ",".join(POLICIES)).split(",")
    for name in policies:
      recovery.load(name)
  except ValueError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  folder = pathlib.Path(given["workdir"])
  folder.mkdir(parents=True, exist_ok=True)
  rows, text = [], ""
  for count, utilisation, name, seed in itertools.product(
    ranks, UTILISATIONS, policies, seeds
  ):
    rows.append(compare(name, count, utilisation, seed))
    print(f"{name}, {count} ranks, {utilisation:g}, seed {seed}: done",
          flush=True)  # fmt: skip
    text, table = to_tables(rows)  # what there is, should it be stopped
    write_text(folder / "closed_form.md", text)
    write_text(folder / "closed_form.csv", table)
  print(f"\n{text}")
  return 0


if __name__ == "__main__":
  sys.exit(launch(sys.argv))
