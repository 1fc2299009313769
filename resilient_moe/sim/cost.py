"""Steps and actions as roofline plus exchange, for any model and placement.

A step of a domain, seconds:

  attend   max over ranks of: dense weights or their flops, whichever is
           longer (GEMM), plus KV bytes or score flops (attention kernel)
  experts  per layer, max over ranks of: weights of the experts that the
           step's tokens touch, or the flops of the rank's (token, expert)
           pairs (`cost_experts`)
  exchange per layer, to the experts and back: latency + bytes over the
           busiest link, inside and between nodes (`links`)
  head     output weights or their flops, over sampled rows
  layers   `layer_s` each, launches and synchronisation

Rates are peaks times the device's efficiencies. Roofline: Williams et al.,
CACM 2009; phases of a disaggregated step and ping-pong: MegaScale-Infer,
arXiv 2504.02263, section 4.1. Loads are expectations: with few tokens the
busiest rank of a real step has somewhat more.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from resilient_moe.recovery.actions import Action
from resilient_moe.recovery.checks import request_ranks
from resilient_moe.recovery.plan import Plan, ordered
from resilient_moe.recovery.price import Cost, Hardware, PlanPrice
from resilient_moe.recovery.semantics import advance
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim import cost_actions, cost_experts, links
from resilient_moe.sim.cost_model import DecodeLine, StepLoad
from resilient_moe.sim.hardware import Device
from resilient_moe.sim.shapes import ModelShape

EXCHANGES = ("all_to_all", "all_gather")


class StepParts(NamedTuple):
  """Seconds of one step by phase, all layers; `total` with their overlap."""

  attend_s: float
  dispatch_s: float
  experts_s: float
  combine_s: float
  head_s: float
  layers_s: float
  total_s: float


@dataclasses.dataclass(frozen=True)
class Roofline:
  """A model on devices: implements `cost_model.Costs`."""

  device: Device
  shape: ModelShape
  load: np.ndarray | None = None  # [E] expert popularity; None: all alike
  exchange: str = "all_to_all"  # between nodes where roles are apart: the same
  microbatches: int = 1  # of ping-pong, where roles are apart
  chunk: int = 512  # prompt tokens a rank prefills in one step

  def __post_init__(self) -> None:
    if self.exchange not in EXCHANGES:
      raise ValueError(
        f"exchange={self.exchange!r}; choices: {', '.join(EXCHANGES)}"
      )
    for name in ("microbatches", "chunk"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: at least 1")
    experts = self.shape.n_experts
    if self.load is not None and np.shape(self.load) != (experts,):
      raise ValueError(
        f"load of shape {np.shape(self.load)} for {experts} experts; one each"
      )

  # Rates that programs get.

  @property
  def memory_rate(self) -> float:
    """Bytes a second."""
    return self.device.memory_bytes_per_s * self.device.memory_efficiency

  def flop_rate(self, dtype: str) -> float:
    """Operations a second."""
    return self.device.flops(dtype) * self.device.compute_efficiency

  # Steps.

  def gemm_s(self, tokens: np.ndarray) -> np.ndarray:
    """Dense weights of all layers over `tokens` [D] of each rank, [D]."""
    s = self.shape
    stream = s.layers_dense_params * s.dense_weight_bytes / self.memory_rate
    flops = 2.0 * s.layers_dense_params * tokens
    busy = np.maximum(stream, flops / self.flop_rate(s.dense_dtype))
    return np.where(tokens > 0, busy, 0.0)

  @property
  def position_s(self) -> float:
    """A row over one more position of KV, one layer: bytes or scores."""
    s = self.shape
    stream = s.kv_values * s.kv_value_bytes / self.memory_rate
    return max(stream, s.score_flops / self.flop_rate(s.dense_dtype))

  def attention_s(self, load: StepLoad) -> np.ndarray:
    """Attention kernels of all layers, [D]."""
    s = self.shape
    full = s.n_layers - s.windowed_layers
    seen = np.minimum(load.context, load.rows * s.window)
    rows = (full * load.context + s.windowed_layers * seen) * self.position_s
    near = np.minimum(load.chunk_context, load.chunk * s.window)
    positions = full * load.chunk_context + s.windowed_layers * near
    # A chunk reads its KV once for all of its tokens: flops decide.
    flops = positions * s.score_flops / self.flop_rate(s.dense_dtype)
    return rows + flops

  def head_s(self, rows: float) -> float:
    """Logits of `rows` rows."""
    s = self.shape
    stream = s.head_params * s.dense_weight_bytes / self.memory_rate
    flops = 2.0 * s.head_params * rows / self.flop_rate(s.dense_dtype)
    return max(stream, flops) if rows else 0.0

  def rate(self, view: ClusterView) -> np.ndarray:
    """Chance that a token picks each expert, [E]."""
    n = view.n_experts
    load = cost_experts.zipf(n) if self.load is None else self.load
    return cost_experts.pick_rate(load, self.shape.top_k, view.masked)

  def experts_s(self, found: cost_experts.ExpertLoad) -> float:
    """The busiest rank's experts in one layer."""
    s = self.shape
    stream = found.touched * s.expert_layer_bytes / self.memory_rate
    flops = 2.0 * s.expert_params * found.pairs
    busy = np.maximum(stream, flops / self.flop_rate(s.expert_dtype))
    return float(busy.max(initial=0.0))

  def exchange_s(
    self,
    view: ClusterView,
    load: StepLoad,
    found: cost_experts.ExpertLoad,
  ) -> tuple[float, float]:
    """To the experts and back, one layer."""
    s, tokens = self.shape, (load.rows + load.chunk).astype(float)
    if self.exchange == "all_gather" and not view.disaggregated:
      one = [b / s.top_k for b in (s.dispatch_bytes, s.combine_bytes)]
      ways = [links.gather(view, load.ranks, tokens * b, self.device)
              for b in one]  # fmt: skip
      return ways[0].seconds, ways[1].seconds
    mine = found.pairs * s.top_k / max(found.pairs.sum(), 1e-300)
    took = []
    for size in (s.dispatch_bytes, s.combine_bytes):
      sent = tokens * size
      # Receivers also get what other domains send.
      everything = (load.tokens + load.others) * size / s.top_k
      got = mine * everything
      way = links.scatter(
        view, load.ranks, sent, found.ranks, got, self.device
      )
      took.append(way.seconds)
    return took[0], took[1]

  def parts(self, view: ClusterView, load: StepLoad) -> StepParts:
    """One step of a domain, by phase."""
    split = self.microbatches if view.disaggregated else 1
    piece = _divided(load, split)
    s, layers = self.shape, self.shape.moe_layers
    tokens = piece.rows + piece.chunk
    attend = float(
      (self.gemm_s(tokens) + self.attention_s(piece)).max(initial=0.0)
    )
    found = cost_experts.expert_load(
      view, self.rate(view), piece.tokens + piece.others
    )
    experts = self.experts_s(found)
    there, back = self.exchange_s(view, piece, found)
    head = self.head_s(float(load.rows.max(initial=0.0)))
    launches = s.n_layers * float(self.device.layer_s)
    phases = attend + layers * (there + experts + back)
    total = _overlapped(
      attend, layers * experts, layers * (there + back), layers, split
    )
    return StepParts(
      attend, layers * there, layers * experts, layers * back, head, launches,
      (phases if split == 1 else total) + head + launches,
    )  # fmt: skip

  def step_s(self, view: ClusterView, load: StepLoad) -> float:
    """One step of a domain: decode rows and prompt chunks together."""
    return self.parts(view, load).total_s if load.tokens else 0.0

  def decode_line(
    self, view: ClusterView, rows: np.ndarray, ranks: np.ndarray | None = None
  ) -> DecodeLine:
    """Decode steps as a line in the busiest rank's context.

    Exact where the rank with most rows has most context, windowed layers see
    a full window and micro-batches are 1 (else an upper bound by at most the
    overlap of attention).
    """
    ranks = request_ranks(view).astype(np.int64) if ranks is None else ranks
    rows = np.asarray(rows, float)
    zero = np.zeros(len(ranks))
    others = _others(view, ranks, rows)
    s = self.shape
    load = StepLoad(ranks, rows, zero, zero, zero, others)
    base = self.step_s(view, load)
    window = s.windowed_layers * s.window * rows.max(initial=0.0)
    full = s.n_layers - s.windowed_layers
    slope = float(full * self.position_s)
    return DecodeLine(float(base + window * self.position_s), slope)

  def prefill_s(
    self, view: ClusterView, to: np.ndarray, tokens: np.ndarray
  ) -> float:
    """Prompts of `tokens` [.] prefilled on ranks `to` [.], chunk by chunk."""
    if not len(to) or not np.sum(tokens):
      return 0.0
    tokens = np.broadcast_to(np.asarray(tokens, float), np.shape(to))
    n = len(view.status)
    each = np.bincount(to, tokens, n)
    # A prompt of t tokens attends to t (t + 1) / 2 positions.
    positions = np.bincount(to, tokens * (tokens + 1) / 2, n)
    ranks = np.flatnonzero(each)
    steps = float(np.ceil(each.max() / self.chunk))
    zero = np.zeros(len(ranks))
    load = StepLoad(
      ranks, zero, zero, each[ranks] / steps, positions[ranks] / steps
    )
    return steps * self.step_s(view, load)

  # Actions.

  def price(self, action: Action, view: ClusterView) -> Cost:
    """An action carried out from `view`: seconds, bytes moved."""
    return cost_actions.price(self, action, view)

  def prefill_part_s(self, action: Action, view: ClusterView) -> float:
    """Of these seconds, those in which requests are prefilled again."""
    stages = cost_actions.stages(self, action, view)
    return sum(s.seconds for s in stages if s.name == cost_actions.PREFILL)

  def price_plan(self, plan: Plan, view: ClusterView) -> PlanPrice:
    """As `recovery.price_plan`, with links instead of one rate a tier."""
    by_action: list[tuple[Action, Cost]] = []
    totals = []
    for part in (plan.resume, plan.repair):
      total = Cost()
      for action in ordered(part):
        if by_action:
          view = advance(view, by_action[-1][0])
        cost = self.price(action, view)
        by_action.append((action, cost))
        total = total + cost
      totals.append(total)
    return PlanPrice(totals[0], totals[1], tuple(by_action))

  def hardware(self, view: ClusterView) -> Hardware:
    """The rates of `recovery.price`, from the same numbers.

    Its bytes move at one rate a tier: `peer` is the link between nodes if
    the view has several, else the one inside. Disk and store are a node's
    (`shared_by_host`). Prefill and step rates are those of the view's ranks.
    """
    return cost_actions.hardware(self, view)


def _divided(load: StepLoad, parts: int) -> StepLoad:
  if parts == 1:
    return load
  return StepLoad(
    load.ranks, load.rows / parts, load.context / parts, load.chunk / parts,
    load.chunk_context / parts, load.others / parts,
  )  # fmt: skip


def _overlapped(
  attend: float, experts: float, exchange: float, layers: int, split: int
) -> float:
  """Ping-pong of `split` micro-batches (MegaScale-Infer, section 4.1).

  With per-layer times Ta, Te and 2Tc of one micro-batch: its own chain, or
  the busier side's `m L` turns behind the first one's, whichever is longer.
  """
  layers = max(layers, 1)
  chain = (attend + experts + exchange) / layers
  busier = max(attend, experts) / layers
  return max(layers * chain, chain + busier * (split * layers - 1))


def _others(view: ClusterView, ranks: np.ndarray, rows: np.ndarray) -> float:
  """Tokens of the other domains, as many rows each as these ranks have.

  Where roles are apart an expert rank works for all attention ranks.
  """
  if not view.disaggregated or not len(ranks):
    return 0.0
  away = len(np.setdiff1d(request_ranks(view), ranks))
  return away * float(rows.mean())
