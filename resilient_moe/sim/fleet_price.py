"""What a plan is worth to a fleet: requests that are served in spite of a loss.

Seconds of `resume` alone would choose a plan that leaves copies out for good;
so what serves during and after the repair counts as long as it will be there:
until the group's next failure.
"""

from collections.abc import Callable

from resilient_moe.recovery.actions import FetchExecutable
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.semantics import advance_all
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim.arrivals import Load
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.fleet_service import decoding_rows, step_of


def unserved(
  costs: Roofline, load: Load, chunk: int, horizon_s: float
) -> Callable[[Plan, ClusterView], float]:
  """The price of plans for `recovery.cheapest`.

  Args:
    costs: how long actions and steps take.
    load: lengths of requests.
    chunk: prompt tokens that a rank prefills in a step, at most.
    horizon_s: until the next failure of a group, on the mean.

  Returns:
    A function of a plan and its view: less the requests that could start
    within the horizon. Of plans for one view, the lowest is the best.
  """

  def cost(plan: Plan, view: ClusterView) -> float:
    price = costs.price_plan(plan, view)
    resumed = advance_all(view, ordered(plan.resume))
    repair = ordered(plan.repair)
    # Programs that are made ready change nothing of what is served.
    whole = advance_all(
      resumed, (a for a in repair if not isinstance(a, FetchExecutable))
    )
    stopped_s, repair_s = price.resume.seconds, price.repair.seconds
    after_s = max(horizon_s - stopped_s - repair_s, 0.0)
    meanwhile = most_per_s(costs, load, chunk, resumed)
    then = most_per_s(costs, load, chunk, whole) if plan.repair else meanwhile
    return -(meanwhile * repair_s + then * after_s)

  return cost


def most_per_s(
  costs: Roofline, load: Load, chunk: int, view: ClusterView
) -> float:
  """Requests a second that `view` can start with all of its rows in use."""
  ranks = request_ranks(view)
  rows = decoding_rows(load, view.rows_per_rank, chunk)
  step_s, _ = step_of(costs, view, load, ranks, rows, chunk)
  return len(ranks) * rows / (load.generated_mean * step_s)
