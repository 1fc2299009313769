"""A device and a model whose times can be computed in one's head."""

import dataclasses

import numpy as np

from resilient_moe.recovery import ClusterView, bare_view, load, start
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.cost_model import StepLoad
from resilient_moe.sim.hardware import Device, Figure, Link
from resilient_moe.sim.shapes import ModelShape

TINY = 1e-30  # a latency that no test sees


def _f(value: float) -> Figure:
  return Figure(value, "test")


PLAIN = Device(
  name="plain",
  memory_bytes=_f(1e9),
  memory_bytes_per_s=_f(1e6),
  flops_per_s={"fp32": _f(1e9)},
  devices_per_node=_f(2),
  intra=Link(_f(TINY), _f(1e5)),
  inter=Link(_f(TINY), _f(1e4)),
  host=Link(_f(TINY), _f(1e5)),
  disk=Link(_f(TINY), _f(1e3)),
  store=Link(_f(TINY), _f(1e2)),
  process_start_s=_f(7.0),
  compile_s=_f(100.0),
  load_executable_s=_f(10.0),
  mesh_s=_f(3.0),
  memory_efficiency=_f(1.0),
  compute_efficiency=_f(1.0),
  layer_s=_f(TINY),
  warm_s=_f(0.1),
  table_s=_f(0.2),
  fence_s=_f(0.3),
  role_s=_f(0.4),
  requeue_s=_f(0.5),
  copy_latency_s=_f(0.01),
)

# Two layers of width 4, 2 heads of 2 for queries and KV; 8 experts of width 5.
SMALL = ModelShape(
  name="small",
  source="test",
  vocab_size=10,
  n_layers=2,
  d_model=4,
  n_heads=2,
  n_kv_heads=2,
  head_dim=2,
  n_experts=8,
  top_k=2,
  expert_width=5,
  tied_embeddings=True,
  dense_dtype="fp32",
  expert_dtype="fp32",
  dense_weight_bytes=4.0,
  expert_weight_bytes=4.0,
  kv_value_bytes=4.0,
  dispatch_value_bytes=4.0,
  combine_value_bytes=4.0,
)


def model(shape: ModelShape = SMALL, **kwargs: object) -> Roofline:
  return Roofline(PLAIN, shape, **kwargs)  # type: ignore[arg-type]


def view(
  policy: str = "restart_cached",
  ranks: int = 4,
  requests: int = 0,
  attention: int = 0,
  shape: ModelShape = SMALL,
  per_host: int = 2,
  rows: int = 4,
  **kwargs: object,
) -> ClusterView:
  """An instance of two hosts as `policy` prepares it."""
  bare = bare_view(
    ranks, shape.n_experts, top_k=shape.top_k, ranks_per_host=per_host,
    expert_bytes=shape.expert_bytes, token_kv_bytes=shape.token_kv_bytes,
    attention=attention, rows_per_rank=rows,
  )  # fmt: skip
  return start(load(policy, **kwargs), bare, requests)


def decode(
  rows: np.ndarray | list[float], context: float = 0.0
) -> StepLoad:
  """Decode rows on ranks 0.., each row at `context` positions."""
  active = np.asarray(rows, float)
  zero = np.zeros(len(active))
  ranks = np.arange(len(active))
  return StepLoad(ranks, active, active * context, zero, zero)


def only(load_: StepLoad, **changes: object) -> StepLoad:
  return dataclasses.replace(load_, **changes)  # type: ignore[arg-type]
