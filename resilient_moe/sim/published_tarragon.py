"""Tarragon (arXiv 2601.01310): stalls, checkpoint ratio, memory of a shadow.

Mixtral-8x7B on 8 attention and 8 expert workers, one H200 each, 8 to a node,
and a checkpoint node. Probes every 10 ms, dead after 3 unanswered ones; a
replacement worker initialises in 18.5 s.
"""

from typing import NamedTuple

import numpy as np

from resilient_moe.recovery import (
  ClusterView,
  RanksLost,
  RestoreKV,
  bare_view,
  load,
  start,
  with_requests,
)
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.cost_model import StepLoad
from resilient_moe.sim.devices import device
from resilient_moe.sim.hardware import Figure, replace
from resilient_moe.sim.published import (
  CONSTRUCTED,
  PREDICTED,
  Row,
  by_action,
  from_case,
  plan_for,
  resume_s,
)
from resilient_moe.sim.shapes import shape

WORKERS = 8  # of each kind
EXPERT_S, ATTENTION_S, COARSE_S = 0.3, 0.4, 64.0
PROBE_S, MISSED = 0.010, 3
RATIO, SHADOW_BYTES = 0.125, 2.5e9
_MODEL = shape("mixtral-8x7b")
_PROBES = "probes of 10 ms, 3 missed"


class Load(NamedTuple):
  """Requests in flight by Little's law: rate x output x step time."""

  rows: int  # a worker
  context: int  # positions of each, on average


def _view(policy: str, rows: int, emitted: int) -> ClusterView:
  """16 workers; every attention worker has `rows` requests in mid-decode."""
  bare = bare_view(
    2 * WORKERS, _MODEL.n_experts, top_k=_MODEL.top_k, ranks_per_host=WORKERS,
    attention=WORKERS, rows_per_rank=2 * rows,
    expert_bytes=_MODEL.expert_bytes, token_kv_bytes=_MODEL.token_kv_bytes,
  )  # fmt: skip
  view = start(load(policy), bare)
  checkpoint = "host" if policy == "tarragon" else "none"
  return with_requests(
    view, WORKERS * rows, prompt_tokens=10, emitted_tokens=emitted,
    checkpoint=checkpoint,
  )  # fmt: skip


def _step_s(
  model: Roofline, view: ClusterView, rows: int, context: int
) -> float:
  """One worker's decode step, the others' tokens at the experts as well."""
  zero = np.zeros(1)
  one = StepLoad(
    np.array([0]), np.array([float(rows)]), np.array([float(rows * context)]),
    zero, zero, others=float((WORKERS - 1) * rows),
  )  # fmt: skip
  return model.step_s(view, one)


def in_flight(
  model: Roofline, view: ClusterView, requests_per_s: float, prompt: int,
  output: int,
) -> Load:  # fmt: skip
  """Rows a worker at `requests_per_s`: Little's law, solved by iterating."""
  rows, context = 1, prompt + output // 2
  for _ in range(20):
    step = _step_s(model, view, rows, context)
    rows = max(round(requests_per_s * output * step / WORKERS), 1)
  return Load(rows, context)


def compose(
  requests_per_s: float = 50.0,
  prompt: int = 10,
  output: int = 128,
) -> list[Row]:
  """Its rows, at a rate in the middle of its 30 to 70 requests a second."""
  model = Roofline(device("h200"), _MODEL)
  flight = in_flight(
    model, _view("tarragon", 1, 64), requests_per_s, prompt, output
  )
  rows, emitted = flight.rows, output // 2
  assumes = f"{requests_per_s:g} requests/s of {prompt} in, {output} out"
  view = _view("tarragon", rows, emitted)
  step = _step_s(model, view, rows, flight.context)
  detect = PROBE_S * MISSED
  # What its 0.3 s hold beside detection and the step that is run again.
  healing = EXPERT_S - detect - step
  tarragon = load("tarragon")
  lost_expert = plan_for(tarragon, view, RanksLost((WORKERS,)))
  lost_attention = plan_for(tarragon, view, RanksLost((0,)))
  none = replace(
    model.device,
    mesh_s=Figure(1e-9, "Tarragon: connections to every peer exist"),
  )
  bare = Roofline(none, _MODEL)
  expert_plan = resume_s(bare, lost_expert)
  attention = by_action(bare, lost_attention)
  restored = next(
    a for a in lost_attention.plan.resume if isinstance(a, RestoreKV)
  )
  kv = bare.price(restored, lost_attention.view)
  coarse = Roofline(
    from_case(model.device, "Tarragon: T_w 18.5 s", process_start_s=18.5),
    _MODEL,
  )
  whole = plan_for(
    load("restart_cached"), _view("restart_cached", rows, emitted),
    RanksLost((WORKERS,)),
  )  # fmt: skip
  replay = output // 2 * step
  return [
    Row("Tarragon", "EW failure, from hardware", "s", EXPERT_S,
        detect + expert_plan + step, PREDICTED, _PROBES, assumes,
        "detection, table, one step again; what else its 0.3 s hold is not "
        "said"),
    Row("Tarragon", "EW failure", "s", EXPERT_S, detect + step + healing,
        CONSTRUCTED, f"itself; {_PROBES}", assumes,
        f"leaves {healing:.2f} s for healing"),
    Row("Tarragon", "AW failure", "s", ATTENTION_S,
        detect + healing + sum(attention.values()) + step, PREDICTED,
        f"EW failure 0.3 s; {_PROBES}", assumes,
        f"+ KV of {len(restored.requests)} requests, {kv.bytes / 1e6:.0f} MB, "
        f"{kv.seconds * 1e3:.1f} ms"),
    Row("Tarragon", "coarse restart", "s", COARSE_S,
        detect + resume_s(coarse, whole) + replay, PREDICTED,
        "worker init 18.5 s", f"{assumes}; disk 10 GB/s a node",
        f"+ weights, programs, prefill, {output // 2} steps again"),
    Row("Tarragon", "KV checkpoint / expert traffic", "", RATIO,
        _MODEL.checkpoint_ratio, CONSTRUCTED, "its formula", "-",
        "on our Mixtral-8x7B shape"),
    Row("Tarragon", "shadow of a DeepSeek-R1 expert", "B", SHADOW_BYTES,
        float(shape("deepseek-v3").expert_bytes), PREDICTED, "-", "FP8",
        "from the model's shape"),
  ]  # fmt: skip
