"""Loaded models compute what the reference computes, in every family."""

import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest

from resilient_moe.model import ModelConfig, forward
from tests.model import harness
from tests.third_party import reference as ref
from tests.third_party.layerwise import first_difference
from third_party import huggingface as hf

TOLERANCE = 2e-5
SEEDS = (0, 1, 2)
T = 40  # longer than every window and every original length
# One of each family, and on how many ranks it is served. (That every choice of
# a config gives equal bits on all of them is for tests/model to say.)
SERVED = {
  "mixtral_window": 1, "qwen3": 7, "olmoe": 8, "deepseek_v2_groups": 3,
  "deepseek_v3": 8, "gpt_oss": 7,
}  # fmt: skip
STEPS = 200
OPTIONS = harness.OPTIONS  # those of the serving programs: bits depend on them
Loaded = tuple[ref.Reference, ModelConfig, dict[str, Any]]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
  """(case, seed) -> the reference's model, and what was loaded of its files."""

  @functools.cache
  def load(name: str, seed: int) -> Loaded:
    folder = tmp_path_factory.mktemp(f"{name}{seed}") / "model"
    made = ref.make(name, folder, seed)
    return made, *hf.load_huggingface(folder)

  return load


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return rng.integers(0, ref.COMMON["vocab_size"], shape, np.int32)


@pytest.mark.parametrize("name", ref.CASES)
def test_the_logits_are_those_of_the_reference(name, models, rng):
  for seed in SEEDS:
    made, config, params = models(name, seed)
    tokens = draw(rng, 2, T)
    got = np.asarray(forward(config, params, tokens, OPTIONS))
    worst = np.abs(got - made.logits(tokens)).max()
    if worst > TOLERANCE:
      where = first_difference(config, params, made, tokens, TOLERANCE)
      pytest.fail(f"{name}, seed {seed}: logits differ by {worst:.2e}; {where}")


def test_the_first_layer_that_differs_is_named(models, rng):
  made, config, params = models("mixtral", 0)
  tokens = draw(rng, 2, T)
  [group] = params["groups"]
  out = group["attention"]["out"]
  attention = {**group["attention"], "out": out.at[1, 0, 0].add(0.1)}
  wrong = {**params, "groups": [{**group, "attention": attention}]}
  said = first_difference(config, wrong, made, tokens, TOLERANCE)
  assert said.startswith("layer 1 differs first")
  said = first_difference(config, params, made, tokens, TOLERANCE)
  assert said == "no layer before the last one differs"


def serve(
  loaded: Loaded, ranks: int, prompts: np.ndarray, steps: int
) -> np.ndarray:
  """Chunked prefill, then greedy decode on the serving programs.

  `prompts` [n, T] lie on as many rows, rank by rank; logits [n, steps, V].
  """
  _, config, params = loaded
  host = jax.tree.map(np.asarray, params)
  with mock.patch.object(harness, "tiny_params", return_value=host):
    engine = harness.Engine(ranks, config=config, copies=1)
  places = [(i % ranks, i // ranks) for i in range(len(prompts))]
  out = np.zeros((len(prompts), steps, config.vocab_size), np.float32)
  for i, (rank, row) in enumerate(places):
    result = engine.prefill(harness.Prompt(rank, row, tuple(prompts[i])))
    out[i, 0] = result.logits[rank, -1]
  for step in range(1, steps):
    result = engine.step([
      harness.Token(
        rank, row, int(out[i, step - 1].argmax()), prompts.shape[1] + step - 1
      )
      for i, (rank, row) in enumerate(places)
    ])  # fmt: skip
    for i, (rank, row) in enumerate(places):
      out[i, step] = result.logits[rank, row]
  return out


@pytest.mark.parametrize("name", SERVED)
def test_served_tokens_are_those_of_the_reference(name, models, rng):
  """Prefill in chunks and decode, over ranks, against whole sequences."""
  loaded = models(name, SEEDS[0])
  made, config, params = loaded
  prompts = draw(rng, 2, 29)  # two chunks and a part of one
  logits = serve(loaded, SERVED[name], prompts, STEPS)
  tokens = logits.argmax(-1)
  np.testing.assert_array_equal(tokens, made.generate(prompts, STEPS))
  # Bit for bit what the full pass on one device gives at those positions.
  full = np.concatenate([prompts, tokens[:, :11]], axis=1).astype(np.int32)
  assert full.shape[1] == T  # a program that is compiled already
  again = np.asarray(forward(config, params, full, OPTIONS))[:, 28:]
  np.testing.assert_array_equal(logits[:, :12], again)
