"""One line for each action and each plan, for logs and figures."""

from collections.abc import Callable, Iterable, Sized

from resilient_moe.recovery import actions as act
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.view import Role

SHOWN = 4  # names listed before the rest is counted

Moving = act.RestoreKV | act.RecomputePrefix


def _some(items: Iterable) -> str:
  names = [str(i) for i in items]
  more = len(names) - SHOWN
  text = ", ".join(names[:SHOWN])
  return f"{text} and {more} more" if more > 0 else text or "none"


def _count(items: Sized, noun: str) -> str:
  return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _mesh_name(name: frozenset[int]) -> str:
  gone = sorted(r for r in name if r >= 0)
  came = sorted(~r for r in name if r < 0)
  text = f"without {_some(gone)}" if gone else "full"
  return f"{text}, with {_some(came)}" if came else text


def _copy(action: act.CopyExperts) -> str:
  moves = (f"{m.expert}->{m.rank}.{m.slot}" for m in action.moves)
  count = _count(action.moves, "expert")
  return f"copy {count} from {action.tier}: {_some(moves)}"


def _remap(action: act.RemapExperts) -> str:
  copies = action.table.copies()
  return f"route {int((copies > 0).sum())} experts to {copies.sum()} slots"


def _moved(verb: str) -> Callable[[Moving], str]:
  def line(action: Moving) -> str:
    pairs = zip(action.requests, action.to, strict=True)
    to = _some(f"{n}->{r}" for n, r in pairs)
    return f"{verb} {_count(action.requests, 'request')}: {to}"

  return line


def _restart(action: act.RestartInstance) -> str:
  how = "stored" if action.cache else "compiled"
  return f"restart on {_count(action.ranks, 'rank')}, programs {how}"


EXPLAIN: dict[type[act.Action], Callable[..., str]] = {
  act.Fence: lambda a: f"fence {_some(a.ranks)}",
  act.RebuildMesh: lambda a: f"mesh of {_count(a.ranks, 'rank')}",
  act.FetchExecutable: lambda a: f"programs of mesh {_mesh_name(a.absent)}",
  act.CopyExperts: _copy,
  act.RemapExperts: _remap,
  act.MaskExperts: lambda a: f"mask experts {_some(a.experts)}",
  act.RestoreKV: lambda a: (
    f"{_moved('restore KV of')(a)} (tier {a.tier})"
  ),
  act.RecomputePrefix: _moved("prefill again"),
  act.Requeue: lambda a: f"queue {_some(a.requests)}",
  act.FailRequests: lambda a: f"fail {_some(a.requests)}",
  act.SwitchRole: lambda a: f"rank {a.rank} becomes {Role(a.role).name}",
  act.LaunchRank: lambda a: f"launch a replacement for rank {a.rank}",
  act.Rejoin: lambda a: f"rank {a.rank} joins",
  act.RestartInstance: _restart,
  act.Verify: lambda a: f"verify with {a.probe}",
}


def explain(action: act.Action) -> str:
  """What `action` does, in one line."""
  return EXPLAIN[type(action)](action)


def explain_plan(plan: Plan) -> str:
  """What `plan` does, in one line, actions in execution order."""
  resume = "; ".join(explain(a) for a in ordered(plan.resume)) or "nothing"
  line = f"pause {_count(plan.paused, 'request')}, resume: {resume}"
  repair = "; ".join(explain(a) for a in ordered(plan.repair))
  return f"{line} | repair: {repair}" if repair else line
