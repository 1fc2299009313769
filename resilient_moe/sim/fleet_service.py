"""How much a group serves, in closed form: from a view to a rate.

Steady state of continuous batching on a rank with `n` rows: each step makes n
tokens, ends `n / G` requests (G: new tokens of a request) and so prefills
`n C / G` prompt tokens of those who follow (C: prompt). They come in chunks: a
rank has one in a part `p` of its steps, some rank in `1 - (1 - p)^R` of them,
and everybody waits for who has. Two calls of the cost model, with and without,
give the mean step's seconds, so a rank starts `n / (G step_s)` requests a
second. Load below that runs with fewer rows: the rate is a concave line over
n, read backwards. A rank prefills one chunk of one prompt a step (the project's
scheduler), so a prompt of `s` chunks sits in a row for s steps more, and no
more than one request in s steps can start.
"""

import dataclasses
from typing import TypeVar

import numpy as np

from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim.arrivals import Load
from resilient_moe.sim.cost_model import Costs, StepLoad

_POINTS = 7  # of the line over n; it is smooth
_LEAST = 0.1  # rows of a rank, on the mean of many


Steps = TypeVar("Steps", float, np.ndarray)


@dataclasses.dataclass(frozen=True)
class Service:
  """What a group in one state serves.

  `rows` and `step_s` are points of the line: rows of a rank that decode, and
  the mean seconds of a step with the prefill that keeps it going.
  """

  ranks: int  # that take requests
  rows: np.ndarray  # [n] float, ascending
  step_s: np.ndarray  # [n]
  filling_s: np.ndarray  # [n] of a step in which somebody prefills
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

  def first_token_s(self, rows: float, steps: Steps) -> Steps:
    """From a row to the first token: half a step, then its prompt's `steps`."""
    filling_s = float(np.interp(rows, self.rows, self.filling_s))
    return (steps + 0.5) * filling_s * self.slowdown


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
    none = np.zeros(0)
    return Service(0, none, none, none, load.generated_mean)
  most = decoding_rows(load, rows, chunk)
  points = np.geomspace(min(_LEAST, most), most, _POINTS)
  both = [
    step_of(costs, view, load, ranks, n, chunk) for n in points.tolist()
  ]
  step_s, filling_s = np.array(both).T + stream_s * points
  return Service(len(ranks), points, step_s, filling_s, load.generated_mean)


def prompt_steps(load: Load, chunk: int) -> float:
  """Steps that a prompt takes."""
  return float(np.ceil(load.context / chunk).mean())


def decoding_rows(load: Load, rows: int, chunk: int) -> float:
  """Of a rank's rows, those that decode when it is full; others prefill."""
  steps, generated = prompt_steps(load, chunk), load.generated_mean
  return min(rows / (1 + steps / generated), generated / steps)


def step_of(
  costs: Costs,
  view: ClusterView,
  load: Load,
  ranks: np.ndarray,
  rows: float,
  chunk: int,
) -> tuple[float, float]:
  """Mean seconds of a step with `rows` rows on each of `ranks` [D].

  And those of a step in which somebody prefills.
  """
  steps, count = prompt_steps(load, chunk), len(ranks)
  mine = min(rows / load.generated_mean * steps, 1.0)
  some = 1 - (1 - mine) ** count
  with_chunk = count * mine / some if some else 0.0  # of those steps
  busy = np.arange(count) < max(round(with_chunk), 1)
  size = load.context_mean / steps * busy
  ones = np.ones(count)

  def seconds(chunks: np.ndarray) -> float:
    # A prompt's token attends to half of the prompt; long ones weigh more.
    seen = chunks * _prompt_context(load)
    context = rows * load.running_context * ones
    return costs.step_s(
      view,
      StepLoad(ranks.astype(np.int64), rows * ones, context, chunks, seen),
    )

  filling_s = seconds(size)
  return some * filling_s + (1 - some) * seconds(0 * ones), filling_s


def _prompt_context(load: Load) -> float:
  """Positions that a prompt's token attends to, mean over tokens."""
  context = load.context.astype(float)
  return float((context * context).sum() / context.sum() / 2)


def useful_rows(load: Load, chunk: int) -> int:
  """Rows of a rank beyond which more of them start no more requests."""
  return int(np.ceil(load.generated_mean / prompt_steps(load, chunk) + 1))


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
    if step_of(costs, view, load, ranks, n, chunk)[0] <= step_s:
      low = middle
    else:
      high = middle - 1
  return low
