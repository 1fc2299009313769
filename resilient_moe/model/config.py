"""The shape of a model, and how its numbers are computed.

Families of models are choices of `ModelConfig`, never forks of a layer. What
is only a layout of a published file (rotary pairs, interleaved gate and up,
transposed matrices) is undone by its loader and not known here.
"""

import dataclasses

from resilient_moe.model.config_checks import check_model, choose

DISPATCHES = ("all_to_all", "all_gather")
EXPERT_KERNELS = ("blocks", "static")
KERNEL_KINDS = ("native", "xla")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only MoE transformer (letters: DESIGN section 3).

  Attention is "gqa" (grouped queries; a cached token is 2K heads of d) or
  "mla" (DeepSeek-V2, section 2.1; a cached token is one latent). The routers:

    softmax_topk   softmax over all experts, then the top k
    sigmoid_topk   sigmoid of each, then the top k (DeepSeek-V3)
    topk_softmax   the top k logits, then softmax over those k (gpt-oss)
  """

  vocab_size: int = 256  # V
  n_layers: int = 4  # L
  d_model: int = 128  # D
  n_heads: int = 4  # H
  n_kv_heads: int = 2  # K; not used by "mla"
  head_dim: int = 32  # d; not used by "mla"
  n_experts: int = 16  # E
  top_k: int = 2  # k
  expert_width: int = 96  # F
  shared_width: int = 0  # width of the shared expert; 0: none
  dense_layers: int = 0  # the first layers without experts
  dense_width: int = 0  # width of a dense layer's MLP
  router: str = "softmax_topk"
  norm_topk_prob: bool = True  # renormalise the chosen experts' weights
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-6
  tied_embeddings: bool = True
  dtype: str = "float32"
  dense_at: tuple[int, ...] = ()  # further layers without experts, ascending
  # Attention.
  attention: str = "gqa"
  attention_bias: bool = False  # of the projections from and to D
  qk_norm: str = "none"  # RMSNorm of q and k: per head, or over all heads
  qkv_clip: float = 0.0  # q, k, v clipped to +-this before RoPE; 0: not
  sinks: bool = False  # one more learnt logit a head, with no value
  windows: tuple[int, ...] = ()  # positions seen, a layer; 0: all; (): all 0
  softmax_scale: float = 0.0  # 0: 1 / sqrt(width of a query head)
  q_rank: int = 0  # "mla": width of the compressed query; 0: not compressed
  kv_rank: int = 0  # "mla": width of the compressed keys and values
  nope_dim: int = 0  # "mla": width of a query head that isn't rotated
  rope_dim: int = 0  # "mla": width of the rotated part, one key for all heads
  value_dim: int = 0  # "mla": width of a value head
  latent_norm_eps: float = 1e-6  # "mla": of the norms of the latents
  # Rotary scaling (`attention.rope_frequencies`).
  rope_scaling: str = "none"
  rope_factor: float = 1.0
  rope_length: int = 0  # positions the model was first trained for
  rope_low: float = 1.0  # "llama3": low_freq_factor
  rope_high: float = 4.0  # "llama3": high_freq_factor
  rope_fast: float = 32.0  # "yarn": beta_fast
  rope_slow: float = 1.0  # "yarn": beta_slow
  rope_truncate: bool = True  # "yarn": whole dimensions bound the ramp
  rope_magnitude: float = 1.0  # cos and sin are multiplied by it
  # Router and experts.
  router_bias: bool = False  # added to the logits
  correction_bias: bool = False  # added to the scores for the choice alone
  router_scale: float = 1.0  # the weights are multiplied by it, at last
  expert_groups: int = 1  # equal runs of experts ...
  top_groups: int = 1  # ... of which the best may be chosen from
  group_score: str = "max"  # of a group: its best score, or its two best's sum
  activation: str = "swiglu"
  swiglu_limit: float = 7.0  # "clamped_swiglu": gate <= this, up within +-this
  swiglu_alpha: float = 1.702  # "clamped_swiglu": gate * sigmoid(this * gate)
  expert_bias: bool = False  # of each routed expert's two projections

  def __post_init__(self) -> None:
    for name in ("windows", "dense_at"):  # JSON has lists
      object.__setattr__(self, name, tuple(getattr(self, name)))
    while self.dense_at[:1] == (self.dense_layers,):  # one way to say it
      object.__setattr__(self, "dense_layers", self.dense_layers + 1)
      object.__setattr__(self, "dense_at", self.dense_at[1:])
    check_model(self)

  @property
  def moe_layers(self) -> int:
    return self.n_layers - self.dense_layers - len(self.dense_at)

  @property
  def kv_heads(self) -> int:
    """Heads of a cached token: keys and values, or one latent."""
    return 1 if self.attention == "mla" else 2 * self.n_kv_heads

  @property
  def kv_width(self) -> int:
    """Width of each of them."""
    if self.attention == "mla":
      return self.kv_rank + self.rope_dim
    return self.head_dim

  @property
  def query_width(self) -> int:
    """Width of a query head before anything is compressed."""
    if self.attention == "mla":
      return self.nope_dim + self.rope_dim
    return self.head_dim

  @property
  def rotated_width(self) -> int:
    """How much of a head RoPE rotates."""
    return self.rope_dim if self.attention == "mla" else self.head_dim

  @property
  def expanded_kv_width(self) -> int:
    """Numbers that a token's keys and values would be, uncompressed."""
    if self.attention == "mla":
      return self.n_heads * (self.query_width + self.value_dim)
    return self.kv_heads * self.kv_width

  def is_dense(self, layer: int) -> bool:
    """Whether a layer has an MLP in place of experts."""
    return layer < self.dense_layers or layer in self.dense_at

  def groups(self) -> tuple[tuple[str, int], ...]:
    """Runs of equal layers, (kind, number of layers), first to last.

    Each run is one stack of parameters and one loop of the program; a family
    with another pattern of layers adds kinds here and in `params.describe`.
    """
    runs: list[tuple[str, int]] = []
    for layer in range(self.n_layers):
      kind = "dense" if self.is_dense(layer) else "moe"
      if runs and runs[-1][0] == kind:
        runs[-1] = (kind, runs[-1][1] + 1)
      else:
        runs.append((kind, 1))
    return tuple(runs)


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How a step is computed: shapes of the engine and numerics.

  Row-invariant numerics (the default, `row_block > 0`) make what a token gets
  independent of what else is in the batch: attention is reduced over KV blocks
  of fixed size in a fixed order, and matrix products are the native kernels'
  (`native/`), whose bits don't depend on the number of rows, or XLA's on blocks
  of at most `row_block` rows (`jax_facts.md`, "What keeps results the same").
  `row_block=0` with `kernels="xla"` does not promise it.
  """

  rows: int = 4  # B, batch rows (and KV slots) on a rank
  max_len: int = 512  # positions of a KV slot
  chunk: int = 64  # prompt tokens a rank prefills in one step
  kv_block: int = 64  # positions of one attention block
  row_block: int = 32  # rows of one matrix product; 0: all at once
  expert_block: int = 0  # rows of an expert's block; 0: 8 small, 32 large
  dispatch: str = "all_to_all"
  experts: str = "blocks"
  kernels: str = "native"  # on CPU in float32; elsewhere XLA's whatever is said

  def __post_init__(self) -> None:
    choose("dispatch", self.dispatch, DISPATCHES)
    choose("experts", self.experts, EXPERT_KERNELS)
    choose("kernels", self.kernels, KERNEL_KINDS)
    if self.row_block and not 2 <= self.row_block <= 32:
      raise ValueError(
        f"row_block={self.row_block}: 0 (off) or 2 to 32, the row counts "
        "whose products have the same bits on CPU"
      )
    for name in ("rows", "max_len", "chunk", "kv_block"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name}={getattr(self, name)}: at least 1")

  @property
  def cache_len(self) -> int:
    """Positions allocated per slot: whole KV blocks, and room for a chunk.

    A chunk that ends short of its width still writes its whole width, behind
    the last valid position, so the slot needs that room.
    """
    blocks = -(-(self.max_len + self.chunk) // self.kv_block)
    return blocks * self.kv_block
