"""How long affected requests wait, by action, beside a restart's stages."""

import pathlib
import shutil
from collections.abc import Mapping, Sequence

from experiments import bench_models as models
from experiments.bench_anatomy import Anatomy, anatomy, copyto_rate
from experiments.bench_record import Cell, Result, Target, stat
from resilient_moe import report
from resilient_moe.faults import scenario
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.gateway import run_case

SCENARIO = "rank_lost_decode"
TWIN, RESTART = "none", "restart_cached"
REST_STEPS = 4.0  # of replica_promotion and mesh_shrink, beside their work
SPEEDUPS = {"mesh_shrink": 20.0, "kv_restore": 50.0}


def run(settings: models.Settings, workdir: pathlib.Path) -> Result:
  """Serves, breaks and recovers under each policy; several seeds."""
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets: list[Target] = []
  notes = []
  for name, model in settings.models.items():
    found: dict[str, list[Anatomy]] = {}
    for seed in model.seeds:
      events = _events(name, model, settings, workdir, seed)
      for policy in settings.policies:
        if policy != TWIN:
          one = anatomy(
            events[policy][0], events[TWIN][0], events[RESTART][0],
            events[policy][1],
          )  # fmt: skip
          found.setdefault(policy, []).append(one)
    for policy, runs in found.items():
      rows.append(_row(name, policy, runs))
      samples |= _samples(f"{name}/{policy}", runs)
      targets += _targets(name, model, policy, runs)
    stages = found[RESTART][0].stages
    spent = ", ".join(f"{k} {v:.2f} s" for k, v in stages.items())
    notes.append(f"{name}: {RESTART}'s stages: {spent}")
  notes.append(
    "by action: median steps of the median stall; floor: the failed step, "
    "the re-prefill, the copy at np.copyto's rate, less the usual gap"
  )
  return Result("stall", rows, samples, targets, notes)


def _events(
  name: str,
  model: models.Model,
  settings: models.Settings,
  workdir: pathlib.Path,
  seed: int,
) -> dict[str, tuple[list[report.Event], float]]:
  """Each policy's history and the memory-copy rate beside it."""
  checkpoint = models.folder_of(name, model, workdir)
  faults = scenario(
    SCENARIO, settings.ranks, seed, at_step=model.fault_step
  )
  found = {}
  for policy in dict.fromkeys((TWIN, RESTART, *settings.policies)):
    folder = workdir / "stall" / name / policy / f"seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    case = Case(
      str(checkpoint), policy, {}, SCENARIO, seed, "emulated", "collocated",
      settings.ranks, dict(model.options), models.requests_of(model, seed),
      () if policy == TWIN else faults,
    )  # fmt: skip
    run_case(case, folder)
    events = report.read_history(folder / "history.jsonl")
    copied = [e for e in events if e["event"] == "action"
              and e["name"] == "CopyExperts"]  # fmt: skip
    nbytes = sum(e["bytes"] for e in copied if e["part"] == "resume")
    found[policy] = events, copyto_rate(nbytes) if nbytes else 0.0
    print(f"  {name}, {policy}, seed {seed}: served", flush=True)
  return found


def _median(values: Sequence[float | None]) -> float | None:
  known = [v for v in values if v is not None]
  return stat(known).median if known else None


def _row(name: str, policy: str, runs: Sequence[Anatomy]) -> dict[str, Cell]:
  middle = lambda f: _median([getattr(r, f) for r in runs])
  valid = all(r.verdict in report.VALID for r in runs)
  row: dict[str, Cell] = {
    "model": name, "policy": policy, "seeds": len(runs),
    "verdict": "true" if valid else "INVALID",
  }  # fmt: skip
  if not valid:
    return row
  step_s = middle("step_s") or 1.0
  row |= {
    "step ms": 1e3 * step_s,
    "stall ms": 1e3 * (middle("stall_s") or 0.0),
    "stall steps": middle("stall_steps"),
    "max steps": middle("stall_max_steps"),
    "rest steps": middle("rest_steps"),
    "speedup": middle("speedup"),
    "floor's speedup": middle("floor_speedup"),
    "copy GB/s": middle("copy_rate"),
    "copyto GB/s": middle("copyto_rate"),
    "by action (steps)": _by_action(runs),
  }
  return row


def _by_action(runs: Sequence[Anatomy]) -> str:
  names = dict.fromkeys(n for r in runs for n in r.by_action_steps)
  parts = []
  for name in names:
    steps = _median([r.by_action_steps.get(name, 0.0) for r in runs])
    parts.append(f"{name} {steps:.2f}")
  return ", ".join(parts)


def _samples(
  key: str, runs: Sequence[Anatomy]
) -> Mapping[str, list[float]]:
  """Per request, in seconds; per run otherwise."""
  per_run = ("stall_steps", "rest_steps", "speedup", "step_s")
  found = {f"{key}/affected_s": [s for r in runs for s in r.affected_s]}
  for field in per_run:
    values = [getattr(r, field) for r in runs]
    found[f"{key}/{field}"] = [v for v in values if v is not None]
  return found


def _targets(
  name: str, model: models.Model, policy: str, runs: Sequence[Anatomy]
) -> list[Target]:
  valid = all(r.verdict in report.VALID for r in runs)
  middle = lambda f: _median([getattr(r, f) for r in runs]) if valid else None
  found = []
  if policy == "kv_restore":
    found.append(Target(
      f"{name}: kv_restore's affected stall", middle("stall_steps"),
      model.kv_restore_steps, "median steps",
    ))  # fmt: skip
  if policy in ("replica_promotion", "mesh_shrink"):
    beside = "re-prefill" + " and copy" * (policy == "mesh_shrink")
    found.append(Target(
      f"{name}: {policy}'s stall beside its {beside}", middle("rest_steps"),
      REST_STEPS, "median steps",
    ))  # fmt: skip
  if policy == "mesh_shrink":
    ours, memory = middle("copy_rate"), middle("copyto_rate")
    ratio = ours / memory if ours and memory else None
    found.append(Target(
      f"{name}: rate of the copy of experts", ratio, 0.5,
      "of np.copyto's rate", at_most=False,
    ))  # fmt: skip
  if policy in SPEEDUPS:
    found.append(Target(
      f"{name}: {policy} against {RESTART}", middle("speedup"),
      SPEEDUPS[policy], "times shorter", at_most=False,
    ))  # fmt: skip
  return found
