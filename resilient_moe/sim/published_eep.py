"""EEP (arXiv 2605.10670): recovery from 1 to 16 lost ranks of one instance.

DeepSeek V3 on 32 GPUs in 4 nodes (of its 48; as its DRAM backup and its
SGLang set-up have it), redundant experts by load. Its stages: metadata, GPU
to GPU moves, weight load from DRAM over RDMA.

Read off the 1-rank case: the share of slots whose expert has one copy only
(1.39% of the slots left had to come from DRAM), the fixed part of the weight
load, the rate of the GPU moves, everything else. The real `eep` policy then
recovers real views with such a placement after 2, 4, 8, 16 losses, and its
copies from host memory are counted and priced. EEP also shuffles most other
experts (it runs its load balancer anew), which our policy does not: the time
of that is its 1-rank time scaled by bytes.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from resilient_moe.recovery import (
  ClusterView,
  CopyExperts,
  RanksLost,
  Tier,
  advance_all,
  bare_view,
  load,
  ordered,
  routing_table,
  start,
)
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.cost_experts import zipf
from resilient_moe.sim.cost_model import StepLoad
from resilient_moe.sim.devices import device
from resilient_moe.sim.published import (
  CONSTRUCTED,
  PREDICTED,
  Planned,
  Row,
  from_case,
  plan_for,
)
from resilient_moe.sim.shapes import shape

RANKS, NODES, CONCURRENCY = 32, 4, 512
PROMPT, OUTPUT = 256, 4_096
BACKUP_BYTES, RESTART_S = 167.5e9, 348.0
_MODEL = shape("deepseek-v3")
_ONE = "1-rank case"


class Case(NamedTuple):
  """A line of its table."""

  total_s: float
  metadata_s: float
  gpu_s: float
  load_s: float
  tokens_per_s: float
  local: float
  gpu: float
  dram: float


HEALTHY_TOKENS_PER_S = 7_182.67
CASES = {
  1: Case(10.546, 0.203, 6.973, 2.002, 6_499.72, 0.0981, 0.8879, 0.0139),
  2: Case(10.920, 1.041, 6.344, 2.198, 6_130.60, 0.0996, 0.8711, 0.0292),
  4: Case(9.348, 0.039, 6.007, 2.114, 5_963.46, 0.0983, 0.8374, 0.0642),
  8: Case(5.783, 0.051, 2.906, 1.846, 5_876.45, 0.0784, 0.7894, 0.1323),
  16: Case(6.540, 2.121, 1.849, 2.155, 3_997.64, 0.0585, 0.5361, 0.4053),
}


def placement(slots_per_rank: int) -> np.ndarray:
  """Slots [RANKS, S]: single copies as many as the 1-rank case implies.

  A lost rank's single copies are what has to come from DRAM:
  `share = dram x (R - 1)` of all slots hold one. They are dealt evenly; the
  other experts share the other slots, copies as far apart as possible.

  Raises:
    ValueError: the other experts would have no second copy, or after the
      largest loss not every expert a slot.
  """
  total, experts = RANKS * slots_per_rank, _MODEL.n_experts
  if (RANKS - max(CASES)) * slots_per_rank < experts:
    raise ValueError(
      f"{slots_per_rank} slots a rank: {experts} experts need more on the "
      f"{RANKS - max(CASES)} ranks that are left"
    )
  single = round(CASES[1].dram * (RANKS - 1) * total)
  rest = total - single
  if single > experts or rest < 2 * (experts - single):
    raise ValueError(
      f"{slots_per_rank} slots a rank: {single} of {experts} experts single, "
      f"{rest} slots for 2 copies of the others"
    )
  held = np.concatenate(
    [np.arange(single), single + np.arange(rest) % (experts - single)]
  )
  slots = np.full((RANKS, slots_per_rank), -1, np.int32)
  place = np.arange(total)
  slots[place % RANKS, place // RANKS] = held
  return slots


def _view(slots_per_rank: int, lost: int) -> ClusterView:
  """An instance with that placement, before `lost` ranks go."""
  rows = CONCURRENCY // RANKS
  bare = bare_view(
    RANKS, _MODEL.n_experts, top_k=_MODEL.top_k, ranks_per_host=RANKS // NODES,
    rows_per_rank=CONCURRENCY, expert_bytes=_MODEL.expert_bytes,
    token_kv_bytes=_MODEL.token_kv_bytes,
  )  # fmt: skip
  view = start(load("eep"), bare, rows * RANKS)
  slots = placement(slots_per_rank)
  slots.setflags(write=False)
  copies = int(np.bincount(slots.ravel()).max())
  table = routing_table(slots, view.mesh, _MODEL.n_experts, copies)
  # Graphs keep stable pointers: no mesh is compiled again.
  ready = view.ready | {frozenset(range(lost))}
  return dataclasses.replace(view, slots=slots, table=table, ready=ready)


def _planned(slots_per_rank: int, lost: int) -> Planned:
  view = _view(slots_per_rank, lost)
  return plan_for(load("eep"), view, RanksLost(tuple(range(lost))))


def _from_dram(planned: Planned) -> CopyExperts:
  return next(
    a
    for a in planned.plan.resume
    if isinstance(a, CopyExperts) and a.tier == Tier.HOST
  )


def compose(
  slots_per_rank: int = 16, gpu: str = "h100", zipf_exponent: float = 0.0
) -> list[Row]:
  """Its rows; the GPU is not named in the paper."""
  nic = float(device(gpu).inter.bytes_per_s)
  base = from_case(
    device(gpu), "EEP: backup in DRAM is read over RDMA", host__bytes_per_s=nic
  )
  one = CASES[1]
  planned = {f: _planned(slots_per_rank, f) for f in CASES}
  moves = {f: _from_dram(p) for f, p in planned.items()}
  bytes_only = Roofline(
    from_case(base, "none", copy_latency_s=1e-9), _MODEL
  ).price(moves[1], planned[1].view).seconds  # fmt: skip
  fixed = from_case(
    base, f"EEP: weight load of the {_ONE}",
    copy_latency_s=one.load_s - bytes_only,
  )  # fmt: skip
  model = Roofline(fixed, _MODEL)
  rest = one.total_s - one.gpu_s - one.load_s
  assumes = f"{RANKS} ranks in use, {slots_per_rank} slots each"
  rows = []
  moved_one = _moved_share(1, one.dram)
  for f, case in CASES.items():
    left = (RANKS - f) * slots_per_rank
    dram = len(moves[f].moves) / left
    gpu_s = one.gpu_s * _moved_share(f, dram) / moved_one
    load_s = model.price(moves[f], planned[f].view).seconds
    kind = CONSTRUCTED if f == 1 else PREDICTED
    what = _ONE if f > 1 else "itself"
    given = [
      ("share of slots from DRAM", "", case.dram, dram, ""),
      ("weight load", "s", case.load_s, load_s,
       "as our policy places them: the busiest rank decides"),
      ("GPU to GPU", "s", case.gpu_s, gpu_s, "scaled by bytes"),
      ("recovery", "s", case.total_s, rest + gpu_s + load_s,
       f"+ {rest:.2f} s of detection and metadata"),
    ]  # fmt: skip
    rows += [
      Row("EEP", f"{f} lost: {name}", unit, published, simulated, kind, what,
          assumes, note)
      for name, unit, published, simulated, note in given
    ]  # fmt: skip
  rows += _throughput(planned, Roofline(base, _MODEL, zipf(
    _MODEL.n_experts, zipf_exponent)), assumes)  # fmt: skip
  return rows + _hardware(Roofline(base, _MODEL), slots_per_rank, assumes)


def _moved_share(lost: int, dram: float) -> float:
  """GPU moves, in slots of one rank: what is neither local nor from DRAM."""
  return (RANKS - lost) * (1 - CASES[1].local - dram)


def _throughput(
  planned: dict[int, Planned], model: Roofline, assumes: str
) -> list[Row]:
  """Tokens a second after the recovery, over those before."""
  context = PROMPT + OUTPUT / 2

  def rate(view: ClusterView) -> float:
    ranks = np.sort(view.mesh).astype(np.int64)
    rows = np.full(len(ranks), float(CONCURRENCY // len(ranks)))
    rows[: CONCURRENCY % len(ranks)] += 1  # some ranks have one more
    zero = np.zeros(len(ranks))
    step = StepLoad(ranks, rows, rows * context, zero, zero)
    return CONCURRENCY / model.step_s(view, step)

  healthy = rate(_view(planned[1].view.slots_per_rank, 1))
  found = []
  for f, case in CASES.items():
    plan = planned[f]
    after = advance_all(plan.view, ordered(plan.plan.resume))
    found.append(
      Row("EEP", f"{f} lost: throughput left", "",
          case.tokens_per_s / HEALTHY_TOKENS_PER_S, rate(after) / healthy,
          PREDICTED, "-", f"{assumes}; roofline of an unnamed GPU",
          "512 requests in all cases")
    )  # fmt: skip
  return found


def _hardware(
  model: Roofline, slots_per_rank: int, assumes: str
) -> list[Row]:
  """What hardware alone says."""
  each = slots_per_rank * CASES[1].gpu * _MODEL.expert_bytes
  link = each / float(model.device.inter.bytes_per_s)
  view = start(
    load("restart"),
    bare_view(
      RANKS, _MODEL.n_experts, top_k=_MODEL.top_k,
      ranks_per_host=RANKS // NODES, expert_bytes=_MODEL.expert_bytes,
      token_kv_bytes=_MODEL.token_kv_bytes,
    ),
  )  # fmt: skip
  whole = plan_for(load("restart"), view, RanksLost((0,)))
  again = model.price_plan(whole.plan, whole.view).resume.seconds
  return [
    Row("EEP", "DRAM backup of a node", "B", BACKUP_BYTES,
        _MODEL.n_experts * _MODEL.expert_bytes / NODES, PREDICTED, "-", "FP8",
        "from the model's shape"),
    Row("EEP", "1 lost: GPU to GPU, from hardware", "s", CASES[1].gpu_s, link,
        PREDICTED, "share of slots moved", assumes,
        "every NIC busy all the time: a bound, not what their moves reach"),
    Row("EEP", "full restart, from hardware", "s", RESTART_S, again,
        PREDICTED, "-", "process start, compile, disk of our GPU entry",
        "its stages are not given"),
  ]  # fmt: skip

