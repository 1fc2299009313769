"""DeepSeek-V2 (arXiv 2405.04434)."""

from third_party.huggingface.decoder import make_config
from third_party.huggingface.fields import Fields
from third_party.huggingface.latent import latent_fields, latent_model
from third_party.huggingface.layout import Model

ARCHITECTURE, MODEL_TYPE = "DeepseekV2ForCausalLM", "deepseek_v2"
_GREEDY, _GROUPS = "greedy", "group_limited_greedy"


def read(fields: Fields, dtype: str) -> Model:
  """The model of a config.json."""
  values = latent_fields(fields, dtype)
  fields.choose("scoring_func", ("softmax",), "softmax")
  fields.choose("mlp_bias", (False,), False)
  # The reference doesn't renormalise, whatever this field says; the model's
  # own code does. No published V2 asks for it.
  fields.choose("norm_topk_prob", (False,), False)
  method = fields.choose("topk_method", (_GREEDY, _GROUPS))
  groups, best = fields.take("n_group", None), fields.take("topk_group", None)
  if method == _GROUPS:
    groups, best = fields.size("n_group"), fields.size("topk_group")
  else:
    groups, best = 1, 1
  config = make_config(fields, {
    **values, "router": "softmax_topk", "norm_topk_prob": False,
    "expert_groups": groups, "top_groups": best, "group_score": "max",
  })  # fmt: skip
  return latent_model(config, pairs=True)
