"""DeepSeek-V3 (arXiv 2412.19437); R1 has the same shape."""

from third_party.huggingface.decoder import make_config
from third_party.huggingface.fields import Fields
from third_party.huggingface.latent import latent_fields, latent_model
from third_party.huggingface.layout import Model
from third_party.huggingface.quantized import FP8

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"
QUANTIZATIONS = (FP8,)


def read(fields: Fields, dtype: str) -> Model:
  """The model of a config.json."""
  values = latent_fields(fields, dtype)
  fields.choose("scoring_func", ("sigmoid",), "sigmoid")
  fields.choose("topk_method", ("noaux_tc",), "noaux_tc")
  config = make_config(fields, {
    **values, "router": "sigmoid_topk", "correction_bias": True,
    "norm_topk_prob": fields.truth("norm_topk_prob"),
    "expert_groups": fields.size("n_group"),
    "top_groups": fields.size("topk_group"), "group_score": "top2",
  })  # fmt: skip
  pairs = fields.truth("rope_interleave", True)
  # Multi-token prediction (section 2.2): no part of the decoder.
  name, other = "num_nextn_predict_layers", "num_mtp_layers"
  after = fields.take(name, 0, also=other)
  return latent_model(config, pairs, after)
