"""Shapes of public models, against the numbers that their authors publish."""

import pytest

from resilient_moe.model.presets import PRESETS, preset
from resilient_moe.model.sizes import model_size

# Billions, total and active, from the model cards and papers: Mixtral of
# experts (arXiv 2401.04088: 47 B, 13 B; card 46.7, 12.9); Qwen3's cards (30.5
# and 3.3; 235 and 22); OLMoE (arXiv 2409.02060: 6.9, 1.3); DeepSeek-V2's card
# (Lite: 15.7, 2.4); DeepSeek-V3's card and README_WEIGHTS (main model 671,
# active 36.6 with the output head, rounded to 37; its MTP module apart);
# gpt-oss model card (table 1: 20.91 and 3.61; 116.83 and 5.13).
PUBLISHED = {
  "mixtral-8x7b": (46.7, 12.9),
  "qwen3-30b-a3b": (30.5, 3.3),
  "qwen3-235b-a22b": (235, 22),
  "olmoe-1b-7b": (6.9, 1.3),
  "deepseek-v2-lite": (15.7, 2.4),
  "deepseek-v3": (671, 37),
  "gpt-oss-20b": (20.91, 3.61),
  "gpt-oss-120b": (116.83, 5.13),
}
# DeepSeek and OpenAI count the output head as active and the input embedding
# not; the others count both.
HEAD_ONLY = ("deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b", "gpt-oss-120b")


def _agrees(count: int, published: float) -> bool:
  """Equal at the digits that are published, rounded or cut off."""
  digits = len(str(published).partition(".")[2])
  return abs(count / 1e9 - published) < 10.0**-digits


def test_every_preset_has_published_numbers():
  assert set(PUBLISHED) == set(PRESETS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
  total, active = PUBLISHED[name]
  size = model_size(preset(name))
  counted = size.active_params
  if name not in HEAD_ONLY:
    counted += size.embedding_params
  assert _agrees(size.params, total), size.params
  assert _agrees(counted, active), counted


def test_latents_are_cached_and_not_keys_and_values():
  size = model_size(preset("deepseek-v3"))
  # DeepSeek-V3: 61 layers of 512 + 64 numbers; expanded 128 heads of 192 + 128.
  assert size.token_kv_bytes == 61 * 576 * 2
  assert size.expanded_token_kv_bytes == 61 * 128 * 320 * 2


def test_bytes_follow_the_dtype():
  half, whole = (
    model_size(preset("olmoe-1b-7b", dtype))
    for dtype in ("bfloat16", "float32")
  )
  assert 2 * half.expert_bytes == whole.expert_bytes
  assert 2 * half.token_kv_bytes == whole.token_kv_bytes
  assert half.dense_bytes + 64 * half.expert_bytes == 2 * half.params


def test_unknown_preset_lists_the_names():
  with pytest.raises(ValueError, match="'mixtral'.*mixtral-8x7b.*gpt-oss-120b"):
    preset("mixtral")
