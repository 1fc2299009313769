"""The whole model against itself, written plainly in NumPy and float64."""

import numpy as np
import pytest

from resilient_moe.model import ModelConfig, forward
from tests.model.harness import OPTIONS, OTHER, TINY, tiny_params


def norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def swiglu(x, w):
  gate, up = np.split(x @ w["gate_up"], 2, axis=-1)
  return gate / (1 + np.exp(-gate)) * up @ w["down"]


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def rotate(x, theta):
  """[T, heads, d] at positions 0 to T."""
  half = x.shape[-1] // 2
  angle = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
  turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
  return np.concatenate([turned.real, turned.imag], axis=-1)


def attention(c: ModelConfig, x, w):
  t, h, k = len(x), c.n_heads, c.n_kv_heads
  heads = (norm(x, w["norm"], c.norm_eps) @ w["qkv"]).reshape(t, -1, c.head_dim)
  queries = rotate(heads[:, :h], c.rope_theta) / np.sqrt(c.head_dim)
  keys = np.repeat(rotate(heads[:, h : h + k], c.rope_theta), h // k, axis=1)
  values = np.repeat(heads[:, h + k :], h // k, axis=1)
  scores = np.einsum("qhd,thd->hqt", queries, keys)
  scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
  out = np.einsum("hqt,thd->qhd", softmax(scores), values)
  return out.reshape(t, -1) @ w["out"]


def experts(c: ModelConfig, x, w):
  """Every token through its top k, one by one, and the shared expert."""
  out = swiglu(x, w["shared"]) if "shared" in w else np.zeros_like(x)
  for i, p in enumerate(softmax(x @ w["router"])):
    chosen = np.argsort(-p, kind="stable")[: c.top_k]
    gates = p[chosen] / (p[chosen].sum() if c.norm_topk_prob else 1)
    for e, gate in zip(chosen, gates, strict=True):
      one = {name: stack[e] for name, stack in w["experts"].items()}
      out[i] += gate * swiglu(x[i], one)
  return out


def wide(tree, layer=None):
  """A tree in float64; of a stack of layers, one."""
  if isinstance(tree, dict):
    return {name: wide(part, layer) for name, part in tree.items()}
  return np.asarray(tree if layer is None else tree[layer], np.float64)


def reference(c: ModelConfig, params, tokens):
  x = wide(params["embed"])[tokens]
  moe = 0
  for group in params["groups"]:
    for layer in range(len(group["mlp_norm"])):
      w = wide(group, layer)
      if "moe" in w:
        w["moe"]["experts"] = wide(params["experts"], moe)
        moe += 1
      x = x + attention(c, x, w["attention"])
      h = norm(x, w["mlp_norm"], c.norm_eps)
      x = x + (experts(c, h, w["moe"]) if "moe" in w else swiglu(h, w["mlp"]))
  head = params["embed"].T if c.tied_embeddings else params["lm_head"]
  return norm(x, wide(params["final_norm"]), c.norm_eps) @ wide(head)


@pytest.mark.parametrize("config", [TINY, OTHER], ids=["tiny", "other"])
def test_forward_is_the_model(config, rng):
  params = tiny_params(config)
  tokens = rng.integers(0, config.vocab_size, (2, 31)).astype(np.int32)
  got = forward(config, params, tokens, OPTIONS)
  for logits, text in zip(got, tokens, strict=True):
    want = reference(config, params, text)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-4)
