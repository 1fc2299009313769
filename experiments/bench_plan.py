"""How long every policy plans at 10,240 ranks."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.bench_models import Settings
from experiments.bench_record import Cell, Result, Target, stat
from resilient_moe.recovery import (
  ClusterView,
  Infeasible,
  Plan,
  RanksLost,
  Status,
  bare_view,
  big_view,
  load,
  policy_names,
  recover_checked,
)

LIMIT_MS = 20.0


def run(settings: Settings, workdir: pathlib.Path) -> Result:
  """Times `recover`, the check of its plan, and `prepare`."""
  del workdir
  n = settings.plan_ranks
  big = functools.cache(
    lambda aws: big_view(n, n_requests=min(2000, 4 * n), attention=aws)
  )
  failure = RanksLost((n // 2,))
  rows: list[dict[str, Cell]] = []
  samples: dict[str, list[float]] = {}
  targets = []
  for name in policy_names():
    policy = load(name)
    # Who has a choice plans for a collocated instance.
    attention = 0 if "collocated" in policy.deployments else n // 4
    bigger = big(attention)
    view = _with_spares(bigger, policy.spares)
    plan = policy.recover(view, failure)
    bare = bare_view(
      n, bigger.n_experts, spares=policy.spares, ranks_per_host=8,
      hosts_per_rack=4, top_k=bigger.top_k, attention=attention,
    )  # fmt: skip
    few = max(settings.plan_repeats // 4, 1)
    planning = functools.partial(policy.recover, view, failure)
    checked = functools.partial(recover_checked, policy, view, failure)
    preparing = functools.partial(policy.prepare, bare)
    ms = {
      "recover": _ms(planning, settings.plan_repeats),
      "recover+check": _ms(checked, few),
      "prepare": _ms(preparing, few),
    }
    samples |= {f"{name}/{what}/ms": values for what, values in ms.items()}
    row: dict[str, Cell] = {
      "policy": name, "attention ranks": attention, "answer": _answer(plan)
    }  # fmt: skip
    row |= {f"{what} ms": stat(values).median for what, values in ms.items()}
    rows.append(row)
    if isinstance(plan, Plan):
      median = stat(ms["recover"]).median
      targets.append(
        Target(f"{name} plans for {n:,} ranks", median, LIMIT_MS, "ms")
      )
  return Result("plan", rows, samples, targets)


def _with_spares(view: ClusterView, count: int) -> ClusterView:
  """The view with idle ranks beside the mesh."""
  fields = {
    name: np.concatenate([old, np.full((count, *old.shape[1:]), new)])
    for name, old, new in (
      ("status", view.status, Status.SPARE),
      ("role", view.role, view.role[0]),
      ("home", view.home, view.home[0]),
      ("host", view.host, view.host[-1]),
      ("rack", view.rack, view.rack[-1]),
      ("slots", view.slots, -1),
    )
  }
  changes: dict[str, Any] = {
    n: x.astype(getattr(view, n).dtype) for n, x in fields.items()
  }
  return dataclasses.replace(view, **changes)


def _answer(plan: Plan | Infeasible) -> str:
  if isinstance(plan, Infeasible):
    return f"infeasible: {plan.reason[:40]}"
  return f"{len(plan.resume)} + {len(plan.repair)} actions"


def _ms(call: Callable[[], object], repeats: int) -> list[float]:
  """Milliseconds of each call, after one that is not counted."""
  call()
  found = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    found.append(1e3 * (time.perf_counter() - start))
  return [float(x) for x in np.asarray(found)]
