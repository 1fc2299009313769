"""Source of write_your_own_policy.ipynb (see build.py)."""

# %% [markdown]
# # Write your own recovery policy
#
# A policy is two pure functions of the cluster as it is left: `prepare` says
# what to keep standing, `recover` answers a failure with a *plan*, which is
# data. It sees no arrays, processes or clocks; so we first check it in
# milliseconds without any model, and then run the very same object on real
# arrays, beside a published recovery and a restart: from nothing to a row in
# the table.

# %% [parameters]
REPOSITORY = ""  # on Colab: the git URL of this repository
CHECKPOINT = "byte_moe"  # one that ships, or a folder of save_checkpoint
RANKS = 4
SEEDS = "0"
BESIDE = "restart_cached,mesh_shrink"  # policies to compare with
WORKDIR = "runs/write_your_own_policy"

# %%
# On Colab, install first.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("resilient_moe") is None:
  if not REPOSITORY:
    raise ValueError("set REPOSITORY above to the git URL of this repository")
  wanted = f"git+{REPOSITORY}"
  subprocess.run([sys.executable, "-m", "pip", "install", wanted], check=True)

# %%
from experiments.notebooks import where

place = where.pick(RANKS)
print(place)

# %% [markdown]
# ## The policy
#
# When ranks are lost, the survivors close up, read the lost experts from disk,
# and the requests of the lost ranks wait in the queue until there is room.
#
# - `Fence` refuses what the lost ranks may still send, `RebuildMesh` makes the
#   survivors the mesh.
# - `rm.advance_all(view, actions)` is the view after those actions; the rest
#   is planned from it.
# - `rm.assign` finds a free slot for each lost expert; if they don't fit, we
#   say so, and another policy may be asked.
# - The order is derived from what actions read and write: a copy goes before
#   the table that routes to it, however we list them.

# %% [file my_policy.py]
"""Close up, read lost experts from disk, queue the displaced requests."""

from resilient_moe import recovery as rm


def make(losses: int = 1) -> rm.RecoveryPolicy:
  """A policy that keeps slots for `losses` ranks and nothing else."""

  def prepare(view: rm.ClusterView) -> rm.Standing:
    slots_per_rank = -(-view.n_experts // (len(view.mesh) - losses))
    slots = rm.place(view, slots_per_rank)
    table = rm.routing_table(slots, view.mesh, view.n_experts, copies=1)
    ready = tuple(frozenset({rank}) for rank in view.mesh.tolist())
    return rm.Standing(slots, table, view.rows_per_rank, ready)

  def recover(
    view: rm.ClusterView, failure: rm.Failure
  ) -> rm.Plan | rm.Infeasible:
    if not isinstance(failure, rm.RanksLost):
      return rm.Infeasible(f"only losses are recovered, not {failure}")
    left = rm.lose(view, failure.ranks)
    mesh = tuple(rank for rank in view.mesh.tolist() if left.alive()[rank])
    if not mesh:
      return rm.Infeasible(f"0 of {len(view.mesh)} ranks are left")
    name = rm.absent(view.launched, mesh)
    who = (rm.Fence(failure.ranks), rm.RebuildMesh(mesh))
    after = rm.advance_all(view, who)
    moves = rm.assign(after, rm.lost_experts(after))
    if isinstance(moves, str):
      return rm.Infeasible(moves)  # the experts don't fit any more
    copy = rm.CopyExperts(moves, rm.Tier.DISK)
    route = rm.RemapExperts(rm.retable(after, moves))
    ids, rank = view.requests.request_id, view.requests.rank
    waiting = tuple(
      q for q, r in zip(ids, rank, strict=True) if r >= 0 and r not in mesh
    )
    fetch, queue = rm.FetchExecutable(name), rm.Requeue(waiting)
    return rm.Plan(resume=(*who, fetch, copy, route, queue), paused=waiting)

  here = ("collocated",)  # where it has been thought through
  return rm.RecoveryPolicy("my_policy", prepare, recover, deployments=here)


# %% [markdown]
# ## Ask it, without a model
#
# A bare cluster of 8 ranks and 16 experts, prepared by the policy, with eight
# requests in mid-decode. Rank 3 dies.

# %%
import importlib
import os

sys.path.insert(0, os.getcwd())
my_policy = importlib.import_module("my_policy")

from resilient_moe import recovery as rm

policy = my_policy.make()
view = rm.start(policy, rm.bare_view(8, 16), requests=8)
failure = rm.RanksLost((3,))
plan = rm.recover_checked(policy, rm.lose(view, [3]), failure)
assert isinstance(plan, rm.Plan), plan
print(rm.explain_plan(plan))

# %% [markdown]
# `recover_checked` has refused nothing, so the plan is legal. Is service
# possible at its end? And what if rank 3 was the second loss?

# %%
after = rm.advance_all(rm.lose(view, [3]), rm.ordered(plan.resume))
print("can be served from:", rm.servable(after) or "yes")
print("mesh:", after.mesh.tolist())
again = rm.recover_checked(policy, rm.lose(after, [5]), rm.RanksLost((5,)))
print(again if isinstance(again, rm.Infeasible) else "a plan again")

# %% [markdown]
# The contract tests of the repository ask more of it (losses in mid-plan, many
# sizes, nothing written to the view); in a clone:
# `RMOE_POLICY=my_policy.make python -m pytest tests/policies`.
#
# ## Run it
#
# Beside ReviveMoE's recovery (`mesh_shrink`) and its baseline. A policy that
# lives elsewhere is named by its dotted path.

# %%
import pathlib

import configs
from experiments import run

status = run.launch([
  "run",
  f"--config={pathlib.Path(configs.__file__).parent / 'runlocal.py'}",
  f"--workdir={WORKDIR}",
  f"--config.checkpoint={CHECKPOINT}",
  f"--config.ranks={RANKS}",
  f"--config.runtime={place.runtime}",
  f"--config.seeds={SEEDS}",
  f"--config.policies={BESIDE},my_policy.make",
])  # fmt: skip
assert status == 0, "a run failed or its history does not check"

# %% [markdown]
# ## Its row in the table

# %%
from IPython.display import Image, Markdown, display

from resilient_moe import report
from resilient_moe.report import style
from resilient_moe.report.table import cell

rows = report.rows_of(report.read_runs(WORKDIR))
shown = (
  "affected_stall_s", "affected_stall_steps", "affected_speedup_vs_restart",
  "redundancy_bytes", "tokens_recomputed", "tokens_exact",
)  # fmt: skip
lines = [f"| policy | verdict | {' | '.join(shown)} |", "|---" * 8 + "|"]
for row in rows:
  cells = " | ".join(cell(row, name) for name in shown)
  lines.append(f"| {row.policy} | {row.verdict} | {cells} |")
display(Markdown("\n".join(lines)))

# %%
with style.context():
  drawn = report.breakdown_figure(rows)
  if drawn is not None:
    png, _ = style.save(drawn, pathlib.Path(WORKDIR) / "breakdown")
    display(Image(str(png), width=450))

# %% [markdown]
# `tokens_exact` 1 and verdict `true`: the answers are those of the fault-free
# run. Now change something: `rm.axes.compose` builds policies from one
# choice on each axis (who serves, where experts come from, how requests go on);
# `policies/README.md` has the rest.
