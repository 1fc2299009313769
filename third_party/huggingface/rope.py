"""Rotary embeddings: both spellings of a config.json -> fields of ModelConfig.

New files have `rope_parameters` with everything in it; older ones `rope_theta`
and, where positions are scaled, `rope_scaling`. The formulas of the defaults
are those of the reference (`transformers`, modeling_rope_utils.py).
"""

from typing import Any

from resilient_moe.model.config import ModelConfig
from resilient_moe.model.rope import yarn_magnitude
from third_party.huggingface.fields import Fields

KINDS = ("default", "linear", "llama3", "yarn")
_KEYS = {
  "default": frozenset(),
  "linear": frozenset({"factor"}),
  "llama3": frozenset({
    "factor", "original_max_position_embeddings", "low_freq_factor",
    "high_freq_factor",
  }),
  "yarn": frozenset({
    "factor", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
  }),
}  # fmt: skip
_COMMON = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


def read_rope(fields: Fields) -> dict[str, Any]:
  """The `rope_*` fields of ModelConfig.

  Raises:
    ValueError: a kind of scaling, or a part of one, that isn't supported.
  """
  scaling, theta = _spelling(fields)
  where = Fields(f"{fields.where}: rope", scaling)
  kind = where.take("rope_type", "default", also="type")
  if kind not in KINDS:
    raise where.error("rope_type", kind, f"supported: {', '.join(KINDS)}")
  if unknown := sorted(
    name
    for name, value in scaling.items()
    if value is not None and name not in _KEYS[kind] | _COMMON
  ):
    raise where.error(
      unknown[0], scaling[unknown[0]],
      f"not a part of rope_type={kind!r}, which has: "
      f"{', '.join(sorted(_KEYS[kind])) or 'none'}",
    )  # fmt: skip
  where.choose("partial_rotary_factor", (1.0,), 1.0)
  if kind == "default":
    return {"rope_theta": theta}
  length = fields.size("max_position_embeddings")
  first = where.size("original_max_position_embeddings", length)
  default = length / first if kind == "yarn" else None
  factor = where.number("factor", default)
  rope = {"rope_theta": theta, "rope_scaling": kind, "rope_factor": factor}
  if kind == "llama3":
    rope["rope_length"] = first
    rope["rope_low"] = where.number("low_freq_factor")
    rope["rope_high"] = where.number("high_freq_factor")
  elif kind == "yarn":
    rope["rope_length"] = first
    rope["rope_fast"] = where.number("beta_fast", 32.0)
    rope["rope_slow"] = where.number("beta_slow", 1.0)
    rope["rope_truncate"] = where.truth("truncate", True)
    rope["rope_magnitude"] = _magnitude(where, factor)
  return rope


def latent_magnitude(fields: Fields, factor: float) -> float:
  """DeepSeek's attention multiplies 1 / sqrt(width) by its square (YaRN)."""
  scaling, _ = _spelling(fields)
  return yarn_magnitude(factor, scaling.get("mscale_all_dim") or 0.0)


def _spelling(fields: Fields) -> tuple[dict[str, Any], float]:
  """What is said of scaling, and the base frequency."""
  new = fields.take("rope_parameters", {})
  old = fields.take("rope_scaling", {})
  for name, value in (("rope_parameters", new), ("rope_scaling", old)):
    if not isinstance(value, dict):
      raise fields.error(name, value, "needed is an object, or null")
    if nested := [k for k, v in value.items() if isinstance(v, dict)]:
      raise fields.error(
        name, value, f"one for each kind of layer ({', '.join(nested)}) is not "
        "supported; needed is one for all",
      )  # fmt: skip
  theta = fields.take("rope_theta", None)
  scaling = dict(old or new)
  fields.choose("partial_rotary_factor", (1.0,), 1.0)
  if new and old:
    raise fields.error(
      "rope_scaling", old, f"but rope_parameters={new!r}; give one of them"
    )
  given = scaling.get("rope_theta")
  if given is not None and theta is not None and given != theta:
    raise fields.error("rope_theta", theta, f"but {given!r} with the scaling")
  source = {"rope_theta": theta if given is None else given}
  return scaling, Fields(fields.where, source).number("rope_theta")


def _magnitude(where: Fields, factor: float) -> float:
  """What cos and sin are multiplied by."""
  given = where.take("attention_factor", None)
  if given is not None:
    return where.number("attention_factor")
  m, all_dim = where.take("mscale", None), where.take("mscale_all_dim", None)
  if m and all_dim:
    return yarn_magnitude(factor, m) / yarn_magnitude(factor, all_dim)
  return yarn_magnitude(factor, 1.0)


def write_rope(c: ModelConfig) -> dict[str, Any]:
  """`rope_parameters` of a config.json, the inverse of `read_rope`."""
  kind = "default" if c.rope_scaling == "none" else c.rope_scaling
  rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": kind}
  if kind == "default":
    return rope
  rope["factor"] = c.rope_factor
  if kind != "linear":
    rope["original_max_position_embeddings"] = c.rope_length
  if kind == "llama3":
    rope |= {"low_freq_factor": c.rope_low, "high_freq_factor": c.rope_high}
  if kind == "yarn":
    rope |= {
      "beta_fast": c.rope_fast, "beta_slow": c.rope_slow,
      "truncate": c.rope_truncate, "attention_factor": c.rope_magnitude,
    }  # fmt: skip
  return rope
