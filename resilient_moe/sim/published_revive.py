"""ReviveMoE (arXiv 2602.21140): five scenarios and their baseline.

DeepSeek V3 on 80 dies of Ascend 910C. Stages it gives: cached compile 6 s
(disaggregated) and 8 s (collocated), generator init and weight load 40 to
50 s, engine and executor processes 10+ s. How long the communication domains
take is read off the attention failure: 10.2 s less the compile and the
sequences' prefill. All else follows.

Where attention and experts are apart our programs belong to ranks, so that
plans have no FetchExecutable; the paper's do compile again there, and its 6 s
are charged to RebuildMesh.
"""

import dataclasses

from resilient_moe.recovery import (
  ClusterView,
  RanksLost,
  RestartInstance,
  bare_view,
  load,
  start,
)
from resilient_moe.sim import cost_actions
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.devices import device
from resilient_moe.sim.hardware import Device
from resilient_moe.sim.published import (
  CONSTRUCTED,
  PREDICTED,
  Planned,
  Row,
  by_action,
  from_case,
  plan_for,
  resume_s,
)
from resilient_moe.sim.shapes import shape

RANKS = 80
ATTENTION_S, REDUNDANT_S, MISSING_S = 10.2, 10.7, 10.8
SWITCH_S, SWITCH_LOAD_S, COLLOCATED_S, BASELINE_S = 52.7, 40.6, 12.8, 83.1
COMPILE_S, COMPILE_COLLOCATED_S = 6.0, 8.0
LOAD_S = (40.0 + 50.0) / 2  # generator init + weight load
PROCESSES_S = 10.0
_ATTENTION = "attention failure 10.2 s"
_MODEL = shape("deepseek-v3")


def _view(
  policy: str, attention: int, rows: int, **kwargs: object
) -> ClusterView:
  """80 ranks, `rows` sequences on each that attends, all in mid-decode."""
  attending = attention or RANKS
  bare = bare_view(
    RANKS, _MODEL.n_experts, top_k=_MODEL.top_k, ranks_per_host=16,
    attention=attention, rows_per_rank=2 * rows,
    expert_bytes=_MODEL.expert_bytes, token_kv_bytes=_MODEL.token_kv_bytes,
  )  # fmt: skip
  return start(load(policy, **kwargs), bare, attending * rows)


def _weights(base: Device, attention: int) -> Device:
  """Every rank reads its own weights at the rate of the baseline's load.

  The baseline loads all ranks at once in as long as the role switch loads
  one: what limits it is a rank's own (deserialise, copy), no shared disk.
  The rank with most to load takes all of that time.
  """
  held = -(-_MODEL.n_experts // (RANKS - attention))
  most = max(held * _MODEL.expert_bytes, _MODEL.dense_bytes)
  rate = most / LOAD_S
  case = "ReviveMoE: generator init + weight load, 45 s, of the baseline"
  return from_case(base, case, host__bytes_per_s=rate, disk__bytes_per_s=1e12)


def compose(
  attention: int = 48, rows: int = 16, chunk: int = 4_096
) -> list[Row]:
  """Its rows: `attention` of the 80 ranks attend, `rows` sequences each."""
  assumes = f"{attention} + {RANKS - attention} ranks, {rows} rows of 120"
  base = _weights(device("ascend-910c"), attention)

  def plan(
    name: str, lost: int, apart: int, **kwargs: object
  ) -> Planned:
    view = _view(name, apart, rows, **kwargs)
    # Graphs of single losses are stored, not warm.
    view = dataclasses.replace(
      view, cached=view.ready, ready=frozenset({frozenset[int]()})
    )
    return plan_for(load(name, **kwargs), view, RanksLost((lost,)))

  attend = plan("revive_moe", 0, attention)
  before = Roofline(base, _MODEL, chunk=chunk)
  parts = by_action(before, attend)
  mesh = ATTENTION_S - sum(parts.values()) + parts["RebuildMesh"]
  apart = Roofline(
    from_case(base, _ATTENTION, mesh_s=mesh), _MODEL, chunk=chunk
  )
  redundant = plan("revive_moe", attention, attention)
  missing = plan(
    "revive_moe", attention, attention, replicas=0, mask_from=32
  )
  switch = plan("revive_moe", attention, attention, replicas=0, losses=0)
  switched = by_action(apart, switch)
  together = Roofline(
    from_case(
      base, "ReviveMoE: attention failure less its compile; compile 8 s",
      mesh_s=mesh - COMPILE_S, load_executable_s=COMPILE_COLLOCATED_S,
    ), _MODEL, chunk=chunk,
  )  # fmt: skip
  collocated = plan("revive_moe", 3, 0)
  baseline = Roofline(
    from_case(
      base, "ReviveMoE: attention failure less its compile; stages stated",
      mesh_s=mesh - COMPILE_S, load_executable_s=COMPILE_S,
      process_start_s=PROCESSES_S,
    ), _MODEL, chunk=chunk,
  )  # fmt: skip
  restart = plan("restart_cached", 0, attention)
  return [
    _row("attention failure", ATTENTION_S, resume_s(apart, attend),
         CONSTRUCTED, _ATTENTION, assumes,
         f"of it prefill {parts['RecomputePrefix']:.2f} s, simulated"),
    _row("MoE failure, redundant experts", REDUNDANT_S,
         resume_s(apart, redundant), PREDICTED, _ATTENTION, assumes),
    _row("MoE failure, missing experts", MISSING_S,
         resume_s(apart, missing), PREDICTED, _ATTENTION, assumes),
    _row("role switch, weight load alone", SWITCH_LOAD_S,
         switched["CopyExperts"], PREDICTED,
         "baseline: generator init + weights 40-50 s", assumes,
         "from what all ranks load at once to what one loads alone"),
    _row("MoE failure, role switch", SWITCH_S, resume_s(apart, switch),
         PREDICTED, f"{_ATTENTION}; baseline: weights 40-50 s", assumes),
    _row("collocated, redundant experts", COLLOCATED_S,
         resume_s(together, collocated), PREDICTED,
         f"{_ATTENTION}; compile 6 and 8 s", assumes),
    _row("baseline, cached restart", BASELINE_S, resume_s(baseline, restart),
         CONSTRUCTED, f"{_ATTENTION}; compile 6 s; processes 10+ s; weights "
         "40-50 s", assumes, _stages(baseline, restart)),
  ]  # fmt: skip


def _row(
  case: str, published: float, simulated: float, kind: str, inputs: str,
  assumes: str, note: str = "",
) -> Row:  # fmt: skip
  return Row(
    "ReviveMoE", case, "s", published, simulated, kind, inputs, assumes, note
  )


def _stages(model: Roofline, planned: Planned) -> str:
  """The restart's stages: what they lack is not in the paper's text."""
  action = next(
    a for a in planned.plan.resume if isinstance(a, RestartInstance)
  )
  found = cost_actions.stages(model, action, planned.view)
  parts = ", ".join(f"{s.name} {s.seconds:.1f}" for s in found)
  return f"{parts}; it names more stages than it gives times for"
