"""Fits a simulation's timing to the histories of real runs.

Medians, and least squares that outliers don't rule (steps, bytes). Nothing is
read but histories, so any runtime's can be fitted.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from resilient_moe.report.history import Event, of_kind, run_of
from resilient_moe.report.stalls import before_faults
from resilient_moe.sim.fitted import ANY, COLD, ActionFit, Fitted, StepFit
from resilient_moe.sim.timing import PART

DELAYS = 16  # most detection delays that are kept
ROUNDS = 12  # of reweighting
LINK_S = 0.5  # `datapath.HealingLimits.link_s`, where no run has lost a link
HEAL_S = 0.03  # and `late_s`, where none has healed


def fit(runs: Sequence[list[Event]], machine: str) -> Fitted:
  """Timing that fits these runs of one runtime.

  Args:
    runs: histories of one runtime, one deployment and one model.
    machine: whose seconds they are, in words.

  Raises:
    ValueError: there are none, they are of several kinds, or lack what is
      needed.
  """
  kinds = {(r["runtime"], r["deployment"]) for r in map(run_of, runs)}
  if len(kinds) != 1:
    raise ValueError(
      f"runs of {len(kinds)} kinds ({sorted(kinds)}); needed are runs of one "
      "runtime and deployment"
    )
  ((runtime, deployment),) = kinds
  samples = _steps(runs)
  if len(samples) < 50:
    raise ValueError(f"{len(samples)} steps in all; at least 50 are needed")
  turn_s = _turn_s(runs)
  decode, prefill = (_step_fit(samples, chunked) for chunked in (0, 1))
  faults = [e for events in runs for e in of_kind(events, "fault")]
  return Fitted(
    about={
      "runtime": runtime, "deployment": deployment, "runs": len(runs),
      "steps": len(samples), "faults": len(faults), "machine": machine,
      "ranges": _ranges(samples),
    },
    decode=decode, prefill=prefill, turn_s=turn_s,
    after_resume=_after_resume(runs, (decode, prefill)),
    actions=_actions(runs, turn_s),
    plan=_plans(runs), detect=_detect(runs, turn_s),
    struck=_struck(runs, runtime, turn_s), behind=runtime == "process",
    mesh_ready=_mesh_ready(runs),
    launch=_launch(runs) if runtime == "process" else 0.0,
    lag=_lag(runs, decode), heal=_healed(runs), link=LINK_S,
    starts=_starts(runs),
  )  # fmt: skip


def median(values: Iterable[float], otherwise: float = 0.0) -> float:
  """The median, at least 0; `otherwise` of nothing."""
  found = list(values)
  return max(float(np.median(found)), 0.0) if found else otherwise


# -- steps: (chunked, ranks, emitted, prefilled, seconds) each


def _steps(runs: Sequence[list[Event]]) -> np.ndarray:
  """All steps as rows, [n, 5]."""
  rows: list[tuple[float, ...]] = []
  for events in runs:
    ranks = 0
    for e in events:
      if e["event"] == "epoch":
        ranks = len(e["mesh"])
      elif e["event"] == "step":
        members = len(e.get("domain", ())) or ranks
        emitted = len(e["emitted"])
        rows.append((float(e["bucket"] > 0), members, emitted,
                     e["prefill_tokens"], e["seconds"]))  # fmt: skip
  return np.array(rows, float).reshape(-1, 5)


def _step_fit(samples: np.ndarray, chunked: int) -> StepFit:
  mine = samples[samples[:, 0] == chunked]
  if not len(mine):
    return _step_fit(samples, 1 - chunked)
  x = np.column_stack([np.ones(len(mine)), mine[:, 1:4]])
  # What doesn't vary enough explains nothing.
  keep = [0] + [i for i in (1, 2, 3) if x[:, i].std() > 0.02 * x[:, i].mean()]
  if not chunked and 3 in keep:
    keep.remove(3)
  found = np.zeros(4)
  while True:
    line = robust(x[:, keep], mine[:, 4])
    bad = [i for i, c in zip(keep, line, strict=True) if c < 0 and i]
    if not bad:
      break
    keep = [i for i in keep if i not in bad]
  found[keep] = line
  return StepFit(*found.tolist())


def robust(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Least absolute deviations of y [n] from x [n, m] by reweighting, [m]."""
  weights = np.ones(len(y))
  line = np.zeros(x.shape[1])
  floor = max(1e-3 * float(np.median(np.abs(y))), 1e-9)
  for _ in range(ROUNDS):
    root = np.sqrt(weights)
    line = np.linalg.lstsq(x * root[:, None], y * root, rcond=None)[0]
    weights = 1 / np.maximum(np.abs(y - x @ line), floor)
  return line


def _ranges(samples: np.ndarray) -> dict[str, tuple[int, int]]:
  names = {"ranks": 1, "tokens a step": 2, "prompt tokens a step": 3}
  return {
    name: (int(samples[:, i].min()), int(samples[:, i].max()))
    for name, i in names.items()
  }


def _turn_s(runs: Sequence[list[Event]]) -> float:
  """What lies between two steps; of domains apart, nothing can be said."""
  gaps = [
    b["t"] - a["t"] - b["seconds"]
    for events in runs if run_of(events)["deployment"] == "collocated"
    for a, b in itertools.pairwise(before_faults(events))
    if a["event"] == b["event"] == "step"
  ]  # fmt: skip
  return median(gaps)


def _after_resume(
  runs: Sequence[list[Event]], lines: tuple[StepFit, StepFit]
) -> tuple[float, float]:
  """How much longer the first step behind a recovery takes.

  Without a prompt chunk and with one; where only one of them was seen, both.
  Programs that were cold are slow once more in that step: left out.
  """
  extra: tuple[list[float], list[float]] = ([], [])
  for events in runs:
    ranks, first, cold = 0, False, False
    for e in events:
      if e["event"] == "epoch":
        ranks = len(e["mesh"])
      elif e["event"] == "engine":
        first = False  # a restart has stages of its own
      elif e["event"] == "plan":
        cold = False
      elif e["event"] == "action":
        cold = cold or _source(e) in COLD
      elif e["event"] == "resumed":
        first = not cold
      elif e["event"] == "step" and first:
        chunked = bool(e["bucket"])
        members = len(e.get("domain", ())) or ranks
        usual = lines[chunked].seconds(
          members, len(e["emitted"]), e["prefill_tokens"]
        )
        extra[chunked].append(e["seconds"] - usual)
        first = False
  known = [median(each or [*extra[0], *extra[1]]) for each in extra]
  return known[0], known[1]


# -- recoveries


def _actions(
  runs: Sequence[list[Event]], turn_s: float
) -> dict[str, ActionFit]:
  """By name, and by tier or source where the history says it."""
  found: dict[str, list[tuple[float, float]]] = {}
  for events in runs:
    before_s = 0.0
    for e in events:
      if e["event"] == "plan":
        before_s = e["t"]
      elif e["event"] == "action" and e["name"] != "RestartInstance":
        seconds = e["seconds"]
        if e["part"] == "resume":  # with what the loop does around it
          seconds = max(e["t"] - before_s - turn_s, 0.0)
          before_s = e["t"]
        sample = (float(e["bytes"] or 0), seconds)
        kind = e.get("tier") or _source(e)
        names = {e["name"], f"{e['name']}/{kind}" if kind else e["name"]}
        for name in names:
          found.setdefault(name, []).append(sample)
  fits = {name: _action_fit(np.array(each)) for name, each in found.items()}
  fixed = [f.fixed for f in fits.values() if not f.per_byte]
  return {**fits, ANY: ActionFit(median(fixed))}


def _source(event: Event) -> str:
  """Where programs came from."""
  said = str(event["outcome"])
  return said if said in ("warm", *COLD) else ""


def _action_fit(samples: np.ndarray) -> ActionFit:
  """A line in the bytes if they vary, else the median."""
  nbytes, seconds = samples.T
  if len(samples) >= 4 and nbytes.std() > 0.05 * nbytes.mean() > 0:
    x = np.column_stack([np.ones(len(nbytes)), nbytes])
    fixed, rate = robust(x, seconds).tolist()
    if fixed >= 0 and rate >= 0:
      return ActionFit(fixed, rate)
  return ActionFit(median(seconds))


def _plans(runs: Sequence[list[Event]]) -> dict[str, float]:
  """From a failure's report to the plan, by policy."""
  found: dict[str, list[float]] = {}
  for events in runs:
    told_s = None
    for e in events:
      if e["event"] == "failure":
        told_s = e["t"]
      elif e["event"] == "plan" and told_s is not None:
        found.setdefault(run_of(events)["policy"], []).append(e["t"] - told_s)
        told_s = None
  everything = [s for each in found.values() for s in each]
  return {ANY: median(everything)} | {n: median(s) for n, s in found.items()}


def _detect(
  runs: Sequence[list[Event]], turn_s: float
) -> dict[str, tuple[float, ...]]:
  """Delays from a fault until the loop could know of its ranks."""
  found: dict[str, list[float]] = {}
  for events in runs:
    for fault in of_kind(events, "fault"):
      delay = next(
        (
          max(e["t"] - fault["t"] - turn_s, 0.0)
          for e in of_kind(events, "failure")
          if e["t"] >= fault["t"] and set(e["ranks"]) & set(fault["ranks"])
        ),
        None,
      )
      if delay is not None:
        found.setdefault(fault["kind"], []).append(delay)
  delays = {kind: _spread(each) for kind, each in found.items()}
  return {ANY: delays.get("rank_lost", (0.0,)), **delays}


def _spread(values: list[float]) -> tuple[float, ...]:
  """At most so many, equally likely, that stand for all."""
  if len(values) <= DELAYS:
    return tuple(sorted(values))
  at = (np.arange(DELAYS) + 0.5) / DELAYS
  return tuple(np.quantile(values, at).tolist())


def _struck(
  runs: Sequence[list[Event]], runtime: str, turn_s: float
) -> float | None:
  """Which part of a step has passed when a fault strikes.

  On processes any (None); elsewhere always the same, measured.
  """
  if runtime == "process":
    return None
  parts = []
  for events in runs:
    for fault in of_kind(events, "fault"):
      before = [e for e in of_kind(events, "step") if e["t"] <= fault["t"]]
      if before and fault["phase"] != "recovery":
        since_s = fault["t"] - before[-1]["t"] - turn_s
        usual_s = median(e["seconds"] for e in before[-9:])
        parts.append(since_s / usual_s)
  return min(median(parts, 1.0), 1.0)


# -- behind traffic, and starts


def _mesh_ready(runs: Sequence[list[Event]]) -> float:
  return median(
    e["seconds"] / e["ready_meshes"]
    for events in runs
    for e in of_kind(events, "prepare") if e["ready_meshes"]
  )  # fmt: skip


def _launch(runs: Sequence[list[Event]]) -> float:
  """From the launch of a rank to what the repair does next with it."""
  waits = []
  for events in runs:
    done = of_kind(events, "action")
    for a, b in itertools.pairwise(done):
      if a["name"] == "LaunchRank" and b["name"] != "LaunchRank":
        waits.append(b["t"] - b["seconds"] - a["t"])
  return median(waits)


def _lag(runs: Sequence[list[Event]], decode: StepFit) -> float:
  """Checkpoints trail by as many steps as were decoded again."""
  steps = [
    e["tokens"] / len(e["request_ids"])
    for events in runs
    for e in of_kind(events, "requests_moved")
    if e["kind"] == "restore" and e["request_ids"]
  ]
  rows = [len(e["emitted"]) for r in runs for e in of_kind(r, "step")]
  ranks = [len(e["mesh"]) for r in runs for e in of_kind(r, "epoch")]
  usual = decode.seconds(int(median(ranks)), int(median(rows)), 0)
  return float(np.mean(steps)) * usual if steps else 0.0


def _healed(runs: Sequence[list[Event]]) -> float:
  found = [e["seconds"] for r in runs for e in of_kind(r, "healed")]
  return median(found, HEAL_S)


def _starts(
  runs: Sequence[list[Event]],
) -> Mapping[str, tuple[tuple[str, float], ...]]:
  """Stages by name, in their order: of first engines, and of restarts.

  What a restart takes beyond its stages (the old engine's end) is one too.
  """
  stages: dict[str, dict[str, list[float]]] = {}
  for events in runs:
    kinds = _restarts(events)
    for generation, kind in kinds.items():
      table = stages.setdefault(kind, {})
      mine = [e for e in of_kind(events, "engine")
              if e["generation"] == generation]  # fmt: skip
      for e in mine:
        table.setdefault(e["stage"], []).append(e["seconds"])
      whole = _restart_s(events, generation)
      if whole is not None:
        known = sum(
          e["seconds"] for e in mine if not e["stage"].startswith(PART)
        )
        table.setdefault("rest", []).append(max(whole - known, 0.0))
  found = {
    kind: tuple((name, median(each)) for name, each in table.items())
    for kind, table in stages.items()
  }
  first = found.get("first", ())
  other = found.get("stored") or found.get("compiled") or first
  return {"first": first, "stored": other, "compiled": other, **found}


def _restarts(events: list[Event]) -> dict[int, str]:
  """Generation -> what kind of start it was."""
  done = [e for e in of_kind(events, "action")
          if e["name"] == "RestartInstance"]  # fmt: skip
  generations = {e["generation"] for e in of_kind(events, "engine")}
  kinds = {0: "first"} if 0 in generations else {}
  for number, e in enumerate(done, 1):
    kinds[number] = str(e["outcome"])
  return kinds


def _restart_s(events: list[Event], generation: int) -> float | None:
  done = [e["seconds"] for e in of_kind(events, "action")
          if e["name"] == "RestartInstance"]  # fmt: skip
  return done[generation - 1] if 0 < generation <= len(done) else None

