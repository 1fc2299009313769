"""Kernels and steps that others measured, beside what a device's numbers say.

DeepEP's low-latency dispatch and combine (deepseek-ai/DeepEP, docs/legacy.md:
128 tokens a rank, 7,168 wide, top 8, FP8 there and BF16 back, H800 with one
400 Gb/s NIC) check `links.scatter`. The throughput of CloudMatrix-Infer (arXiv
2506.12708, abstract) and of DeepSeek's own service (deepseek-ai/
open-infra-index, V3/R1 inference system overview: prefill with EP 32, decode
with EP 144, 32 redundant experts each, averages of one day) check whole steps.
"""

import numpy as np

from resilient_moe.recovery import ClusterView, bare_view, load, start
from resilient_moe.sim import links
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.cost_model import StepLoad
from resilient_moe.sim.devices import device
from resilient_moe.sim.hardware import Device, Figure, replace
from resilient_moe.sim.published import PREDICTED, Row
from resilient_moe.sim.shapes import shape

TOKENS = 128
# EP size -> microseconds of dispatch, of combine.
DEEPEP = {
  8: (77, 114),
  16: (118, 195),
  32: (155, 273),
  64: (173, 314),
  128: (192, 369),
  256: (194, 360),
}
PREFILL_TOKENS_PER_S = 6_688.0  # a package of two dies
# DeepSeek's service, a node of 8 H800; 56.3% of the input tokens are cached.
NODE_OUTPUT_PER_S, NODE_INPUT_PER_S, CACHED = 14_800.0, 73_700.0, 0.563
USER_TOKENS_PER_S = 21.0  # 20 to 22
CONTEXT = 4_989  # KV length of an output token, on average
_MODEL = shape("deepseek-v3")


def _h800() -> Device:
  """An H100 with half of its NVLink."""
  docs = Figure(160e9, "DeepEP docs/legacy.md: H800, ~160 GB/s NVLink maximum")
  return replace(device("h100"), intra__bytes_per_s=docs)


def deepep() -> list[Row]:
  """Twelve latencies from two bandwidths."""
  h800, rows = _h800(), []
  for ranks, measured in DEEPEP.items():
    view = bare_view(ranks, _MODEL.n_experts, ranks_per_host=8)
    every = np.arange(ranks)
    ways = zip(
      ("dispatch", "combine"),
      (_MODEL.dispatch_bytes, _MODEL.combine_bytes),
      measured,
      strict=True,
    )
    for name, size, took in ways:
      sent = np.full(ranks, TOKENS * size)
      found = links.scatter(view, every, sent, every, sent, h800)
      rows.append(
        Row("DeepEP", f"EP{ranks} {name}", "us", took, found.seconds * 1e6,
            PREDICTED, "-", "links of our H100 entry, H800's NVLink",
            f"{found.inter_bytes / 1e6:.1f} MB a NIC")
      )  # fmt: skip
  return rows


def _view(ranks: int, per_node: int, replicas: int = 0) -> ClusterView:
  """`ranks` that do both, `replicas` redundant experts, nobody lost."""
  bare = bare_view(
    ranks, _MODEL.n_experts, top_k=_MODEL.top_k, ranks_per_host=per_node,
    expert_bytes=_MODEL.expert_bytes, token_kv_bytes=_MODEL.token_kv_bytes,
  )  # fmt: skip
  policy = load("replica_promotion", replicas=replicas, losses=0)
  return start(policy, bare)


def deepseek(prompt: int) -> list[Row]:
  """A decode step and the prefill rate of its service."""
  base, ranks, zero = _h800(), np.arange(144), np.zeros(144)
  rows = np.full(144, round(NODE_OUTPUT_PER_S / 8 / USER_TOKENS_PER_S))
  step = Roofline(base, _MODEL).step_s(
    _view(144, 8, 32), StepLoad(ranks, rows, rows * CONTEXT, zero, zero)
  )
  every = np.arange(32)
  took = Roofline(base, _MODEL, chunk=prompt).prefill_s(
    _view(32, 8, 32), every, np.full(32, prompt)
  )
  return [
    Row("DeepSeek service", "decode step, EP144", "ms",
        1e3 / USER_TOKENS_PER_S, step * 1e3, PREDICTED,
        f"{rows[0]} rows a GPU (of 14.8k tokens/s a node at 20-22 a user), "
        f"context {CONTEXT}", "75% of memory, 60% of arithmetic peak",
        "no overlap here; theirs has two micro-batches"),
    Row("DeepSeek service", "prefill of a GPU, EP32", "tokens/s",
        NODE_INPUT_PER_S * (1 - CACHED) / 8, prompt / took, PREDICTED, "-",
        f"prompts of {prompt}, 60% of peak arithmetic",
        "a day's average, of nodes that are not always full"),
  ]  # fmt: skip


def cloudmatrix(ranks: int, prompt: int) -> list[Row]:
  """Prefill throughput of a package, every rank busy with whole prompts."""
  base = device("ascend-910c")
  view = _view(ranks, 16)
  model = Roofline(base, _MODEL, chunk=prompt)
  took = model.prefill_s(view, np.arange(ranks), np.full(ranks, prompt))
  return [
    Row("CloudMatrix-Infer", "prefill of a 910C package", "tokens/s",
        PREFILL_TOKENS_PER_S, 2 * prompt / took, PREDICTED, "-",
        f"{ranks} dies, prompts of {prompt}, 60% of peak arithmetic",
        "no overlap of exchange and compute here; theirs has two "
        "micro-batches")
  ]  # fmt: skip


def compose(ranks: int = 32, prompt: int = 4_096) -> list[Row]:
  """All; `ranks` and `prompt` of CloudMatrix-Infer's prefill step."""
  return deepep() + cloudmatrix(ranks, prompt) + deepseek(prompt)
