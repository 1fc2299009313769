"""The shape of a model, and how its numbers are computed."""

import dataclasses

ROUTERS = ("softmax_topk",)
DISPATCHES = ("all_to_all", "all_gather")
EXPERT_KERNELS = ("blocks", "static")


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only MoE transformer (letters: DESIGN section 3)."""

  vocab_size: int = 256  # V
  n_layers: int = 4  # L
  d_model: int = 128  # D
  n_heads: int = 4  # H
  n_kv_heads: int = 2  # K
  head_dim: int = 32  # d
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

  def __post_init__(self) -> None:
    _choose("router", self.router, ROUTERS)
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      minimum = 0 if field.name in _MAY_BE_ZERO else 1
      if field.type is int and value < minimum:
        raise ValueError(f"{field.name}={value}: at least {minimum}")
    if self.top_k > self.n_experts:
      raise ValueError(
        f"top_k={self.top_k}: at most n_experts={self.n_experts}"
      )
    if self.n_heads % self.n_kv_heads:
      raise ValueError(
        f"n_heads={self.n_heads}: a multiple of n_kv_heads={self.n_kv_heads}"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim={self.head_dim}: even, for RoPE")
    if self.dense_layers > self.n_layers:
      raise ValueError(
        f"dense_layers={self.dense_layers}: at most n_layers={self.n_layers}"
      )
    if self.dense_layers and not self.dense_width:
      raise ValueError("dense_width=0: at least 1 where there are dense_layers")

  @property
  def moe_layers(self) -> int:
    return self.n_layers - self.dense_layers

  def groups(self) -> tuple[tuple[str, int], ...]:
    """Runs of equal layers, (kind, number of layers), first to last.

    Each run is one stack of parameters and one loop of the program; a family
    with another pattern of layers adds kinds here and in `params.describe`.
    """
    runs = (("dense", self.dense_layers), ("moe", self.moe_layers))
    return tuple((kind, count) for kind, count in runs if count)


_MAY_BE_ZERO = ("shared_width", "dense_layers", "dense_width")


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """How a step is computed: shapes of the engine and numerics.

  Row-invariant numerics (the default, `row_block > 0`) make what a token gets
  independent of what else is in the batch: every matrix product is done on
  blocks of at most `row_block` rows, and attention is reduced over KV blocks
  of fixed size in a fixed order (`jax_facts.md`, "What keeps results the
  same"). `row_block=0` is the fastest variant and does not promise it.
  """

  rows: int = 4  # B, batch rows (and KV slots) on a rank
  max_len: int = 512  # positions of a KV slot
  chunk: int = 64  # prompt tokens a rank prefills in one step
  kv_block: int = 64  # positions of one attention block
  row_block: int = 32  # rows of one matrix product; 0: all at once
  expert_block: int = 0  # rows of an expert's block; 0: 8 small, 32 large
  dispatch: str = "all_to_all"
  experts: str = "blocks"

  def __post_init__(self) -> None:
    _choose("dispatch", self.dispatch, DISPATCHES)
    _choose("experts", self.experts, EXPERT_KERNELS)
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
