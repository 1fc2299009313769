"""What all groups of a fleet share: policy, costs, load, memory."""

import dataclasses

from resilient_moe.recovery.checks import expert_ranks, request_ranks
from resilient_moe.recovery.packing import slots_needed
from resilient_moe.recovery.policy import RecoveryPolicy, Standing
from resilient_moe.recovery.start import stand
from resilient_moe.recovery.view import ClusterView
from resilient_moe.sim.arrivals import Load
from resilient_moe.sim.cost_model import Costs
from resilient_moe.sim.fleet_queue import Demand, Healthy
from resilient_moe.sim.fleet_service import (
  Service,
  rows_within,
  service,
  useful_rows,
)


@dataclasses.dataclass(frozen=True)
class Memory:
  """Of a device, and what it holds beside experts and KV."""

  device_bytes: float
  dense_bytes: float  # of an attending rank: all but the routed experts
  reserve: float = 0.1  # of the device: activations, buffers, programs

  def rows(self, expert_bytes: float, row_bytes: float) -> int:
    """Rows of `row_bytes` that fit beside `expert_bytes` of experts."""
    room = self.device_bytes * (1 - self.reserve)
    room -= self.dense_bytes + expert_bytes
    return max(int(room / row_bytes), 0)


def kept_times(standing: Standing) -> int:
  """How often device memory holds the KV of a request."""
  return 2 if standing.checkpoint == "peer" else 1


@dataclasses.dataclass(frozen=True)
class Shape:
  """What a group may use, and what it promises."""

  row_tokens: float  # positions of KV that a row is reserved for
  chunk: int  # prompt tokens that a rank prefills in a step
  most_rows: int  # of a rank
  tbt_slo_s: float  # mean gap between tokens
  headroom: float = 0.8  # of it that a full, healthy group uses


@dataclasses.dataclass(frozen=True)
class Template:
  """A group as its policy prepared it, which all healthy ones are."""

  view: ClusterView  # with the policy's redundancy, without requests
  standing: Standing
  service: Service
  stream_s: float = 0.0  # that a row's checkpointing adds to a step
  healthy: Healthy | None = None


@dataclasses.dataclass(frozen=True)
class Setting:
  """What groups are simulated with."""

  policy: RecoveryPolicy
  fallback: RecoveryPolicy  # a restart, where the policy has no plan
  costs: Costs
  load: Load
  memory: Memory
  shape: Shape
  demand: Demand
  detect_s: float  # a loss is reported after
  straggler_s: float  # a slow rank is reported after
  cold: bool = False  # restarts compile
  restart_part: float = 0.0  # of a group: idle devices worth a restart

  def rows(self, view: ClusterView, slots: int, standing: Standing) -> int:
    """Rows of a rank whose experts fill `slots`."""
    row_bytes = self.shape.row_tokens * view.token_kv_bytes
    fit = self.memory.rows(
      slots * view.expert_bytes, row_bytes * kept_times(standing)
    )
    return min(fit, view.rows_per_rank)

  def service(self, view: ClusterView, prepared: Template) -> Service:
    """What `view` serves."""
    rows = self.rows(view, view.slots_per_rank, prepared.standing)
    return service(
      self.costs, view, self.load, rows, self.shape.chunk, prepared.stream_s
    )


def _stream_s(costs: Costs, view: ClusterView, standing: Standing) -> float:
  """Seconds that a row's checkpointing adds to a step: none of it hidden."""
  if standing.checkpoint == "none":
    return 0.0
  hardware = costs.hardware(view)
  peer = standing.checkpoint == "peer"
  rate = hardware.peer_bytes_per_s if peer else hardware.host_bytes_per_s
  return view.token_kv_bytes / rate


def template(
  bare: ClusterView,
  policy: RecoveryPolicy,
  costs: Costs,
  load: Load,
  memory: Memory,
  shape: Shape,
) -> Template:
  """Prepares a group: as many rows as memory and the objective allow.

  The policy's slots, its checkpoints on peers and the rows that it reserves
  take from the same memory: what that leaves is what redundancy costs.

  Raises:
    ValueError: not even one row fits; names the bytes.
  """
  unit = 1 << 20
  probe = policy.prepare(dataclasses.replace(bare, rows_per_rank=unit))
  row_bytes = shape.row_tokens * bare.token_kv_bytes * kept_times(probe)
  held = probe.slots.shape[1] * bare.expert_bytes
  fit = memory.rows(held, row_bytes)
  view = stand(bare, probe)
  limit_s = shape.tbt_slo_s * shape.headroom
  most = min(fit, shape.most_rows, useful_rows(load, shape.chunk))
  rows = rows_within(costs, view, load, most, shape.chunk, limit_s)
  asked = int(rows * unit / probe.rows_per_rank)
  if fit < 1 or asked < 1:
    raise ValueError(
      f"policy {policy.name!r}: no rows for requests: {fit} of "
      f"{row_bytes / 1e9:.3g} GB fit beside {probe.slots.shape[1]} experts of "
      f"{bare.expert_bytes / 1e9:.3g} GB and {memory.dense_bytes / 1e9:.3g} GB "
      f"of other weights in {memory.device_bytes / 1e9:.3g} GB, {rows} make a "
      f"token in {limit_s:.3g} s; give more ranks, or a looser tbt_slo_s"
    )
  standing = policy.prepare(dataclasses.replace(bare, rows_per_rank=asked))
  view = stand(bare, standing)
  stream_s = _stream_s(costs, view, standing)
  served = service(
    costs, view, load, view.rows_per_rank, shape.chunk, stream_s
  )
  return Template(view, standing, served, stream_s)


def with_healthy(
  prepared: Template, demand: Demand, minutes: int
) -> Template:
  """The template with its month without faults."""
  healthy = Healthy(demand, prepared.service.capacity, minutes)
  return dataclasses.replace(prepared, healthy=healthy)


def extra_bytes(
  prepared: Template, memory: Memory, shape: Shape
) -> tuple[float, float]:
  """What redundancy fills: bytes of a group's devices, and of its hosts.

  On devices: slots beyond those that hold every expert once, checkpoints, and
  all of a spare. On hosts: checkpoints, and experts (once).
  """
  view, standing = prepared.view, prepared.standing
  holders = len(expert_ranks(view))
  slots = view.slots_per_rank - slots_needed(view.n_experts, holders)
  spares = len(view.status) - len(view.mesh)
  device = slots * holders * view.expert_bytes + spares * memory.device_bytes
  rows = len(request_ranks(view)) * view.rows_per_rank
  kept = rows * shape.row_tokens * view.token_kv_bytes
  device += kept * (standing.checkpoint == "peer")
  host = kept * (standing.checkpoint == "host")
  host += standing.host_weights * view.n_experts * view.expert_bytes
  return float(device), float(host)
