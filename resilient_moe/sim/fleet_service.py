"""How much a group serves, in closed form: from a view to a rate.

Steady state of continuous batching on a rank with `n` rows: each step makes n
tokens, ends `n / G` requests (G: new tokens of a request) and so prefills
`n C / G` prompt tokens of those who follow (C: prompt). One call of the cost
model gives that step's seconds, so a rank starts `n / (G step_s)` requests a
second. Load below that runs with fewer rows: the rate is a concave line over
n, read backwards. A rank prefills one chunk of one prompt a step (the project's
scheduler), so a prompt of `s` chunks sits in a row for s steps more, and no
more than one request in s steps can start.
"""

import dataclasses

import numpy as np

from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim.arrivals import Load
from resilient_moe.sim.cost_model import Costs, StepLoad

_POINTS = 6  # of the line over n; it is smooth


@dataclasses.dataclass(frozen=True)
class Service:
  """What a group in one state serves.

  `rows` and `step_s` are points of the line: rows of a rank that decode, and
  the seconds of its step with the prefill that keeps it going.
  """

  ranks: int  # that take requests
  rows: np.ndarray  # [n] float, ascending
  step_s: np.ndarray  # [n]
  generated: float  # new tokens of a request
  slowdown: float = 1.0

  def slowed(self, slowdown: float) -> "Service":
    """The same with a rank that is `slowdown` times slower: all wait for it."""
    return dataclasses.replace(self, slowdown=slowdown)

  @property
  def rates(self) -> np.ndarray:
    """Requests a second at `rows`, [n]."""
    step_s = self.step_s * self.slowdown
    return self.ranks * self.rows / (self.generated * step_s)

  @property
  def capacity(self) -> float:
    """Requests a second, at most."""
    return float(self.rates.max()) if len(self.rows) else 0.0

  def running(self, rate: float) -> float:
    """Rows that decode on a rank at `rate` requests a second, or all."""
    if not len(self.rows):
      return 0.0
    rates, rows = np.append(0.0, self.rates), np.append(0.0, self.rows)
    return float(np.interp(rate, np.maximum.accumulate(rates), rows))

  def step_at(self, rows: float) -> float:
    """Seconds of a step with `rows` a rank: the gap between two tokens."""
    return float(np.interp(rows, self.rows, self.step_s)) * self.slowdown


def service(
  costs: Costs,
  view: ClusterView,
  load: Load,
  rows: int,
  chunk: int,
  stream_s: float = 0.0,
) -> Service:
  """The service of `view`; of 0 ranks or rows, none.

  Args:
    costs: how long a step takes.
    view: who serves.
    load: lengths of requests.
    rows: of a rank, at most.
    chunk: prompt tokens that a rank prefills in a step, at most.
    stream_s: what a row adds to a step where KV is checkpointed.
  """
  ranks = request_ranks(view)
  if rows < 1 or not len(ranks):
    return Service(0, np.zeros(0), np.zeros(0), load.generated_mean)
  most = decoding_rows(load, rows, chunk)
  points = np.geomspace(min(1.0, most), most, _POINTS)
  step_s = [step_of(costs, view, load, ranks, n) for n in points.tolist()]
  streamed_s = np.array(step_s) + stream_s * points
  return Service(len(ranks), points, streamed_s, load.generated_mean)


def prompt_steps(load: Load, chunk: int) -> float:
  """Steps that a prompt takes."""
  return float(np.ceil(load.context / chunk).mean())


def decoding_rows(load: Load, rows: int, chunk: int) -> float:
  """Of a rank's rows, those that decode when it is full; others prefill."""
  steps, generated = prompt_steps(load, chunk), load.generated_mean
  return min(rows / (1 + steps / generated), generated / steps)


def step_of(
  costs: Costs, view: ClusterView, load: Load, ranks: np.ndarray, rows: float
) -> float:
  """Seconds of a step with `rows` rows on each of `ranks` [D]."""
  ones = np.ones(len(ranks))
  chunk = rows * load.context_mean / load.generated_mean
  batch = StepLoad(
    ranks=ranks.astype(np.int64),
    rows=rows * ones,
    context=rows * load.running_context * ones,
    chunk=chunk * ones,
    # A prompt's token attends to half of the prompt; long ones weigh more.
    chunk_context=chunk * _prompt_context(load) * ones,
  )
  return costs.step_s(view, batch)


def _prompt_context(load: Load) -> float:
  """Positions that a prompt's token attends to, mean over tokens."""
  context = load.context.astype(float)
  return float((context * context).sum() / context.sum() / 2)


def rows_within(
  costs: Costs,
  view: ClusterView,
  load: Load,
  most: int,
  chunk: int,
  step_s: float,
) -> int:
  """The largest number of rows, up to `most`, whose step takes `step_s`.

  0 if a single row takes longer.
  """
  ranks = request_ranks(view)
  low, high = 0, most
  while low < high:
    middle = (low + high + 1) // 2
    n = decoding_rows(load, middle, chunk)
    if step_of(costs, view, load, ranks, n) <= step_s:
      low = middle
    else:
      high = middle - 1
  return low
