"""Model shapes as plain numbers, and the bytes and flops that follow.

Letters (DESIGN section 3): `L` layers, `D` model width, `H` query heads, `K`
KV heads, `d` head size, `E` experts, `k` experts per token, `F` expert width,
`V` vocabulary. A matrix of a x b costs 2ab flops a token. Norms, biases and
quantisation scales (under 0.1% of the bytes) are left out.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Latent:
  """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

  KV of a token is one latent of `kv_rank` and one rotary key of `rope`,
  shared by all heads. In decode the up-projections are absorbed (its
  appendix), so a head scores over kv_rank + rope and sums over kv_rank.
  """

  q_rank: int  # 0: queries are not compressed
  kv_rank: int
  nope: int  # head size without position
  rope: int  # head size with rotary position
  value: int


@dataclasses.dataclass(frozen=True)
class ModelShape:
  """What the cost of a decoder-only MoE transformer depends on."""

  name: str
  source: str
  vocab_size: int
  n_layers: int
  d_model: int
  n_heads: int
  n_kv_heads: int
  head_dim: int
  n_experts: int
  top_k: int
  expert_width: int
  shared_width: int = 0  # width of the shared expert(s); 0: none
  dense_layers: int = 0  # the first layers without experts
  dense_width: int = 0
  tied_embeddings: bool = False
  latent: Latent | None = None
  window: int = 0  # positions a windowed layer attends to; 0: none
  windowed_layers: int = 0
  dense_dtype: str = "bf16"  # arithmetic and weights outside of experts
  expert_dtype: str = "bf16"
  dense_weight_bytes: float = 2.0  # a parameter
  expert_weight_bytes: float = 2.0
  kv_value_bytes: float = 2.0  # a cached number
  dispatch_value_bytes: float = 2.0  # a number on the way to an expert
  combine_value_bytes: float = 2.0  # and on its way back

  @property
  def moe_layers(self) -> int:
    """Layers with experts."""
    return self.n_layers - self.dense_layers

  @property
  def attention_params(self) -> int:
    """Of one layer: GQA `D(2H + 2K)d`; latent: its five projections."""
    d, h = self.d_model, self.n_heads
    if self.latent is None:
      return d * (2 * h + 2 * self.n_kv_heads) * self.head_dim
    a = self.latent
    query = a.nope + a.rope
    to_q = h * query * (a.q_rank or d) + d * a.q_rank
    to_kv = d * (a.kv_rank + a.rope) + a.kv_rank * h * (a.nope + a.value)
    return to_q + to_kv + h * a.value * d

  @property
  def expert_params(self) -> int:
    """Of one expert in one layer: gate, up and down, `3DF`."""
    return 3 * self.d_model * self.expert_width

  @property
  def layers_dense_params(self) -> int:
    """All layers without their routed experts."""
    d = self.d_model
    mlps = self.dense_layers * 3 * d * self.dense_width
    moe = self.moe_layers * (3 * d * self.shared_width + d * self.n_experts)
    return self.n_layers * self.attention_params + mlps + moe

  @property
  def head_params(self) -> int:
    """The output head; as much again for the embeddings if they are apart."""
    return self.vocab_size * self.d_model

  @property
  def params(self) -> int:
    """All of them."""
    routed = self.moe_layers * self.n_experts * self.expert_params
    tables = self.head_params * (1 if self.tied_embeddings else 2)
    return self.layers_dense_params + routed + tables

  @property
  def expert_layer_bytes(self) -> float:
    """Weights of one expert in one layer."""
    return self.expert_params * self.expert_weight_bytes

  @property
  def expert_bytes(self) -> int:
    """Weights of one logical expert, all layers (`ClusterView`'s unit)."""
    return round(self.moe_layers * self.expert_layer_bytes)

  @property
  def dense_bytes(self) -> int:
    """What every attending rank holds: all but the routed experts."""
    tables = self.head_params * (1 if self.tied_embeddings else 2)
    params = self.layers_dense_params + tables
    return round(params * self.dense_weight_bytes)

  @property
  def kv_values(self) -> int:
    """Cached numbers of one token in one layer."""
    if self.latent is not None:
      return self.latent.kv_rank + self.latent.rope
    return 2 * self.n_kv_heads * self.head_dim

  @property
  def token_kv_bytes(self) -> int:
    """KV of one token, all layers (windowed ones too: as they are written)."""
    return round(self.n_layers * self.kv_values * self.kv_value_bytes)

  @property
  def score_flops(self) -> int:
    """Of one token over one position in one layer: scores and sum."""
    if self.latent is not None:
      width = 2 * self.latent.kv_rank + self.latent.rope
      return 2 * self.n_heads * width
    return 4 * self.n_heads * self.head_dim

  @property
  def dispatch_bytes(self) -> float:
    """Of one token to all its experts of one layer, `k D` numbers."""
    return self.top_k * self.d_model * self.dispatch_value_bytes

  @property
  def combine_bytes(self) -> float:
    """And back."""
    return self.top_k * self.d_model * self.combine_value_bytes

  @property
  def checkpoint_ratio(self) -> float:
    """KV bytes over expert traffic, a token and layer (Tarragon, C / V)."""
    kv = self.kv_values * self.kv_value_bytes
    return kv / (self.dispatch_bytes + self.combine_bytes)


def _hub(repository: str) -> str:
  return f"config.json of {repository} on the Hugging Face hub"


_FP8 = {
  "dense_dtype": "fp8",
  "expert_dtype": "fp8",
  "dense_weight_bytes": 1.0,
  "expert_weight_bytes": 1.0,
  "dispatch_value_bytes": 1.0,  # DeepEP: FP8 dispatch, BF16 combine
}
# MXFP4: blocks of 32 numbers of 4 bits and a scale of 8 (OCP MX 1.0).
_MXFP4_BYTES = (32 * 4 + 8) / 32 / 8


def _gpt_oss(size: str, layers: int, experts: int) -> ModelShape:
  return ModelShape(
    name=f"gpt-oss-{size}",
    source=_hub(f"openai/gpt-oss-{size}"),
    vocab_size=201_088,
    n_layers=layers,
    d_model=2_880,
    n_heads=64,
    n_kv_heads=8,
    head_dim=64,
    n_experts=experts,
    top_k=4,
    expert_width=2_880,
    window=128,
    windowed_layers=layers // 2,
    expert_weight_bytes=_MXFP4_BYTES,
  )


def _qwen3(name: str, repository: str, layers: int, d: int, heads: int,
           width: int) -> ModelShape:  # fmt: skip
  return ModelShape(
    name=name,
    source=_hub(repository),
    vocab_size=151_936,
    n_layers=layers,
    d_model=d,
    n_heads=heads,
    n_kv_heads=4,
    head_dim=128,
    n_experts=128,
    top_k=8,
    expert_width=width,
  )


_MODELS = (
  ModelShape(
    name="mixtral-8x7b",
    source=_hub("mistralai/Mixtral-8x7B-v0.1") + "; arXiv 2401.04088",
    vocab_size=32_000,
    n_layers=32,
    d_model=4_096,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    n_experts=8,
    top_k=2,
    expert_width=14_336,
  ),
  _qwen3("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 48, 2_048, 32, 768),
  _qwen3("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", 94, 4_096, 64, 1_536),
  ModelShape(
    name="olmoe-1b-7b",
    source=_hub("allenai/OLMoE-1B-7B-0924") + "; arXiv 2409.02060",
    vocab_size=50_304,
    n_layers=16,
    d_model=2_048,
    n_heads=16,
    n_kv_heads=16,
    head_dim=128,
    n_experts=64,
    top_k=8,
    expert_width=1_024,
  ),
  ModelShape(
    name="deepseek-v2-lite",
    source=_hub("deepseek-ai/DeepSeek-V2-Lite") + "; arXiv 2405.04434",
    vocab_size=102_400,
    n_layers=27,
    d_model=2_048,
    n_heads=16,
    n_kv_heads=16,
    head_dim=192,
    n_experts=64,
    top_k=6,
    expert_width=1_408,
    shared_width=2 * 1_408,
    dense_layers=1,
    dense_width=10_944,
    latent=Latent(q_rank=0, kv_rank=512, nope=128, rope=64, value=128),
  ),
  ModelShape(
    name="deepseek-v3",
    source=_hub("deepseek-ai/DeepSeek-V3") + "; arXiv 2412.19437",
    vocab_size=129_280,
    n_layers=61,
    d_model=7_168,
    n_heads=128,
    n_kv_heads=128,
    head_dim=192,
    n_experts=256,
    top_k=8,
    expert_width=2_048,
    shared_width=2_048,
    dense_layers=3,
    dense_width=18_432,
    latent=Latent(q_rank=1_536, kv_rank=512, nope=128, rope=64, value=128),
    **_FP8,  # type: ignore[arg-type]
  ),
  _gpt_oss("20b", 24, 32),
  _gpt_oss("120b", 36, 128),
  ModelShape(
    name="byte_moe",
    source="resilient_moe/assets/byte_moe/config.json (shipped)",
    vocab_size=256,
    n_layers=4,
    d_model=128,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    n_experts=16,
    top_k=2,
    expert_width=96,
    tied_embeddings=True,
    dense_dtype="fp32",
    expert_dtype="fp32",
    dense_weight_bytes=4.0,
    expert_weight_bytes=4.0,
    kv_value_bytes=4.0,
    dispatch_value_bytes=4.0,
    combine_value_bytes=4.0,
  ),
)
MODELS: dict[str, ModelShape] = {model.name: model for model in _MODELS}


def shape(name: str) -> ModelShape:
  """The preset `name`.

  Raises:
    ValueError: unknown; names the choices.
  """
  if name not in MODELS:
    raise ValueError(f"unknown model {name!r}; choices: {', '.join(MODELS)}")
  return MODELS[name]
