"""Kernels and steps that others measured, beside what a device's numbers say.

DeepEP's low-latency dispatch and combine (deepseek-ai/DeepEP, docs/legacy.md:
128 tokens a rank, 7,168 wide, top 8, FP8 there and BF16 back, H800 with one
400 Gb/s NIC) check `links.scatter`. The throughput of CloudMatrix-Infer (arXiv
2506.12708, abstract) checks a whole prefill step.
"""

import numpy as np

from resilient_moe.recovery import bare_view, load, start
from resilient_moe.sim import links
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.devices import device
from resilient_moe.sim.hardware import Figure, replace
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
_MODEL = shape("deepseek-v3")


def deepep() -> list[Row]:
  """Twelve latencies from two bandwidths."""
  docs = Figure(160e9, "DeepEP docs/legacy.md: H800, ~160 GB/s NVLink maximum")
  h800 = replace(device("h100"), intra__bytes_per_s=docs)
  rows = []
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


def cloudmatrix(ranks: int, prompt: int) -> list[Row]:
  """Prefill throughput of a package, every rank busy with whole prompts."""
  base = device("ascend-910c")
  view = start(
    load("restart_cached", losses=0),
    bare_view(
      ranks, _MODEL.n_experts, top_k=_MODEL.top_k, ranks_per_host=16,
      expert_bytes=_MODEL.expert_bytes, token_kv_bytes=_MODEL.token_kv_bytes,
    ),
  )  # fmt: skip
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
  """Both; `ranks` and `prompt` of the prefill step."""
  return deepep() + cloudmatrix(ranks, prompt)
