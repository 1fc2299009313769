"""The model that ships: small enough, and worth what its card says."""

import json
import pathlib

import numpy as np
import pytest

import resilient_moe.model as model_lib
from experiments import corpus, train_eval

FOLDER = pathlib.Path(model_lib.__file__).parents[1] / "assets" / "byte_moe"
CARD = json.loads((FOLDER / "card.json").read_text())


def test_all_of_it_is_at_most_six_megabytes() -> None:
  size = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
  assert size <= 6_000_000


def test_its_run_was_finished() -> None:
  assert CARD["steps"] == CARD["total_steps"]


def test_it_beats_the_ngram() -> None:
  assert CARD["held_out_bits_per_byte"] < CARD["ngram_bits_per_byte"] < 8


def test_every_expert_is_used() -> None:
  load = np.array(CARD["load"])
  even = 1 / load.shape[1]
  assert load.min() > even / 4
  assert load.max() < even * 4
  assert min(CARD["load_entropy"]) > 0.9


def test_a_slice_scores_what_the_card_says() -> None:
  text = corpus.load()
  config, params = model_lib.load_checkpoint(FOLDER)
  scored = train_eval.evaluate(
    config, params, text.held_out[: CARD["slice_bytes"]],
    CARD["config"]["eval_context"],
  )  # fmt: skip
  # Another Python carries other text: the same quality, not the same bytes.
  same_text = text.sha1 == CARD["corpus_sha1"]
  tolerance = 2e-3 if same_text else 0.15
  assert scored.bits_per_byte == pytest.approx(
    CARD["slice_bits_per_byte"], abs=tolerance
  )


def test_the_readme_has_the_cards_numbers() -> None:
  readme = (FOLDER / "README.md").read_text()
  for value in (
    f"**{CARD['held_out_bits_per_byte']:.3f}**",
    f"{CARD['ngram_bits_per_byte']:.3f}",
    CARD["command"],
    *CARD["samples"],
  ):
    assert value in readme
