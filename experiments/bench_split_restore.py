"""A request's KV from the store, against running the request again.

On processes with nobody else there. Again: its prompt, then a step a token,
as it was the first time (the papers' sequential replay); or all its known
tokens as one prompt, as this runtime does where there is no checkpoint.
"""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Sequence

from experiments import bench_models as models
from experiments import bench_split as split
from experiments.bench_record import Cell, Result, paired, stat
from resilient_moe.runtime.process.data import DataClient
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import admit, complete
from resilient_moe.serving.state import SchedulerState, accept, with_ranks

POLICY = "tarragon"
PROMPT = 32  # tokens, where a request runs as it did the first time
RESTORED, REPLAYED, PREFILLED = "restored", "replayed", "prefilled"
ROOM = 8  # positions beyond the longest request
PATIENCE_S = 20.0


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """All three over several lengths, in turns; for each model."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  lengths = settings.split.restore_tokens
  for name, model in settings.apart().items():
    longer = split.with_options(model, max_len=max(lengths) + ROOM)
    engine = split.open_engine(
      name, longer, settings, workdir, attention=settings.split.attention,
      ranks=settings.split.ranks, rows=int(model.options["rows"]),
      processes=True, policy=POLICY,
    )  # fmt: skip
    split.say(f"{name}: up")
    closing = contextlib.closing
    with closing(engine), closing(Restore(engine)) as bench:
      found: dict[int, dict[str, list[float]]] = {n: {} for n in lengths}
      for repeat in range(-1, settings.split.restore_repeats):
        for n in lengths if repeat >= 0 else lengths[:1]:
          for key, seconds in bench.measure(n).items():
            if repeat >= 0:  # the first one warms up
              found[n].setdefault(key, []).append(seconds)
        split.say(f"{repeat + 1} of {settings.split.restore_repeats}")
      row_bytes = bench.token_bytes
    rows += [row(name, n, found[n], n * row_bytes) for n in lengths]
    for n in lengths:
      samples |= {f"{name}/{n}/{key}": v for key, v in found[n].items()}
  note = (
    "restored: pulled from the store into another attention worker's row; "
    f"replayed: a prompt of {PROMPT} tokens, or half of a shorter request, and "
    "a decode step for each further one; prefilled: all tokens as a prompt"
  )
  return Result("split_restore", rows, samples, (), (note,))


class Restore:
  """Runs and restores one request at a time."""

  def __init__(self, engine: split.Driven) -> None:
    (self._from,), (self._to,), *_ = engine.backend.domains()
    self._engine = engine
    self._count = 0
    (address,) = engine.backend.kv._stores.addresses().values()
    self._address = address
    self._client = DataClient(address, engine.backend.crew.authkey)
    self._old: tuple[str, ...] = ()
    view = engine.backend.view()
    self.token_bytes = view.token_kv_bytes

  def close(self) -> None:
    """Ends the link to the store; the engine is its owner's."""
    self._client.close()

  def measure(self, tokens: int) -> dict[str, float]:
    """Seconds of each way to the KV of so many tokens."""
    prompt = min(PROMPT, tokens // 2)
    _, prefilled_s = self._serve(tokens, 0)
    name, replayed_s = self._serve(prompt, tokens - prompt)
    self._wait_stored(name, tokens)
    fields = {
      "request_id": name, "row": 0, "what": "kv", "address": self._address,
      "args": (name,),
    }  # fmt: skip
    crew = self._engine.backend.crew
    start = time.perf_counter()
    said = crew.call({self._to: {"rows": [fields]}}, "rows").good()
    seconds = time.perf_counter() - start
    ((_, restored, _, error),) = said[self._to]
    if error or restored != tokens:
      raise RuntimeError(f"restored {restored} of {tokens} tokens: {error}")
    return {
      RESTORED: seconds, REPLAYED: replayed_s, PREFILLED: prefilled_s
    }  # fmt: skip

  def _serve(self, prompt: int, decoded: int) -> tuple[str, float]:
    """A request until its row holds so many tokens; seconds."""
    self._count += 1
    name = f"r{self._count}"
    vocabulary = self._engine.plans.config.vocab_size
    tokens = tuple((7 * i + self._count) % vocabulary for i in range(prompt))
    rows = self._engine.backend.view().rows_per_rank
    state = with_ranks(SchedulerState(), (self._from,), rows)
    request = Request(name, tokens, decoded + 2)
    state, _ = admit(accept(state, request))
    start = time.perf_counter()
    while state.sequences[name].computed < prompt + decoded:
      state = self._step(state)
    seconds = time.perf_counter() - start
    self._old = (name,)
    return name, seconds

  def _step(self, state: SchedulerState) -> SchedulerState:
    backend = self._engine.backend
    batch = self._engine.batch(state, (self._from,))
    # The store forgets who was there before.
    backend.begin(dataclasses.replace(batch, retired=self._old))
    self._old = ()
    ended: Sequence = ()
    while not ended:
      ended = backend.finished(split.WAIT_S)
    ((_, sampled),) = ended
    if sampled is None:
      raise RuntimeError(f"step {batch.number} of {batch.mesh} failed")
    return complete(state, batch, sampled)[0]

  def _wait_stored(self, name: str, tokens: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while self._client.records().get(name, 0) < tokens:
      if time.monotonic() > deadline:
        raise RuntimeError(f"the store has not got {tokens} tokens of {name}")
      time.sleep(0.01)


def row(
  name: str, tokens: int, found: dict[str, list[float]], nbytes: int
) -> dict[str, Cell]:
  """Medians of a length, and ratios of neighbours."""
  restored = stat(found[RESTORED]).median
  cells: dict[str, Cell] = {
    "model": name, "tokens": tokens, "KB": nbytes / 1e3,
    "restored ms": 1e3 * restored, "MB/s": nbytes / restored / 1e6,
  }  # fmt: skip
  for key in (REPLAYED, PREFILLED):
    ratio = stat(paired(found[key], found[RESTORED]))
    cells |= {
      f"{key} ms": 1e3 * stat(found[key]).median, f"{key} / restored":
      ratio.median, f"{key}: low": ratio.low, f"{key}: high": ratio.high,
    }  # fmt: skip
  return cells
