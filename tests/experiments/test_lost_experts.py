"""What losing experts costs, on a tiny model and little text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lost_experts as config_file
from experiments import lost_experts
from experiments import lost_experts_score as scoring
from experiments import lost_experts_texts as texts
from experiments.corpus import Document
from resilient_moe.model import ModelConfig, describe, forward
from resilient_moe.model.checkpoint import save_checkpoint
from resilient_moe.model.params import is_spec

TINY = ModelConfig(
  n_layers=1,
  d_model=32,
  n_heads=2,
  n_kv_heads=1,
  head_dim=16,
  n_experts=8,
  top_k=2,
  expert_width=16,
)
TEXT = "The expert that is lost answers no more.\nWho is asked instead?\n\n"


def _random(config):
  """Parameters from NumPy: nothing is compiled for them."""
  rng = np.random.default_rng(0)
  make = lambda s: jnp.asarray(
    rng.standard_normal(s.shape, np.float32) / max(s.fan_in, 1) ** 0.5
  )
  return jax.tree.map(make, describe(config), is_leaf=is_spec)


@pytest.fixture(scope="module")
def params():
  return _random(TINY)


@pytest.fixture(scope="module")
def checkpoint(params, tmp_path_factory):
  folder = tmp_path_factory.mktemp("model") / "tiny"
  save_checkpoint(folder, TINY, params)
  return folder


def _windows(text=8 * TEXT, context=16, warmup=4, most=6):
  document = Document("text", text)
  cut = texts.cut, texts.ByteTokenizer()
  return cut[0]("text", [document], cut[1], context, warmup, most)


def _config(folder, tmp_path, **changes):
  file = tmp_path / "english.txt"
  if not file.exists():
    file.write_text(8 * TEXT)
  config = config_file.get_config()
  config.update(
    checkpoint=str(folder),
    texts=str(file),
    fractions="0,1/64,1/8,1/2",
    context=16,
    warmup=4,
    windows=6,
    batch=4,
  )
  config.update(changes)
  return config


# -- texts


def test_windows_begin_with_a_separator_and_score_behind_the_warmup():
  windows = _windows()
  assert windows.tokens.shape == (6, 17)
  assert (windows.tokens[:, 0] == 0).all()
  assert bytes(windows.tokens[1, 1:].tolist()) == (8 * TEXT).encode()[16:32]
  assert (windows.scored == (np.arange(16) >= 4)).all()


def test_nothing_behind_the_end_of_a_text_is_scored():
  windows = _windows(text="abcdefgh", context=16)
  assert windows.scored[0].tolist() == 4 * [False] + 4 * [True] + 8 * [False]


def test_no_long_document_fills_a_domain():
  long, short = Document("long", 20 * TEXT), Document("short", TEXT)
  tokenizer = texts.ByteTokenizer()
  windows = texts.cut("both", [long, short], tokenizer, 16, 4, 6)
  assert windows.document.tolist() == [0, 1, 0, 1, 0, 1]


def test_own_domains_were_never_trained_on(monkeypatch):
  names = ("abc", "queue", "difflib", "heapq", "pathlib", "urllib")
  modules = tuple(Document(name, f"{name}: {TEXT}") for name in names)
  monkeypatch.setattr(texts, "_modules", lambda: modules)
  held = {name for name in names if Document(name, "").held_out}
  assert held  # else nothing is tested
  for domain in ("docstrings", "code"):
    assert {d.name for d in texts.own_documents(domain)} == held
  assert all(d.held_out for d in texts.own_documents("documentation"))
  assert "import " in texts.own_documents("code")[0].text


def test_bytes_of_tokens_add_up(tmp_path):
  tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
  text = "Müller sagt: 'naïve' 🙂🙂 twice — 日本 ok."
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator([8 * TEXT], vocab_size=300)
  bpe.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "config.json").write_text("{}")
  tokenizer = texts.FileTokenizer(tmp_path)
  tokens, sizes = tokenizer.encode(text)
  assert len(tokens) == len(sizes)
  assert sizes.sum() == len(text.encode())
  assert (sizes >= 0).all()
  assert (sizes == 0).any()  # several tokens for one character
  windows = texts.cut("t", [Document("t", text)], tokenizer, 100, 0, 1)
  # Without a token that begins a text, the first one is read only.
  assert tokenizer.first == -1
  assert windows.tokens[0, 0] == tokens[0]
  assert (windows.sizes * windows.scored).sum() == sizes[1:].sum()


# -- which experts


def test_fractions_become_experts():
  assert scoring.counts(["0", "1/64", "1/8", "1/2"], TINY) == {
    0: "0",
    1: "1/8",
    4: "1/2",
  }


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("some", "'some' is no fraction"),
    ("1", "at least 0 and below 1"),
    ("-1/8", "at least 0"),
    ("7/8", "leaves 1; a token needs 2"),
  ],
)
def test_wrong_fractions_are_named(text, match):
  with pytest.raises(ValueError, match=match):
    scoring.counts([text], TINY)


def test_most_used_ones_go_first_and_others_are_spread():
  load = np.array([[0.0, 0.4, 0.1, 0.5], [0.6, 0.1, 0.1, 0.2]])
  most = scoring.gone(scoring.Loss(2, scoring.MOST_USED, "masked"), load)
  assert most.tolist() == [True, False, False, True]
  nth = scoring.Loss(2, scoring.EVERY_NTH, "masked")
  assert scoring.gone(nth, load).tolist() == [True, False, True, False]


def test_load_is_that_of_the_text(params):
  load = scoring.load_of(TINY, params, _windows(), batch=4)
  assert load.shape == (1, 8)
  np.testing.assert_allclose(load.sum(axis=1), 1, rtol=1e-6)


# -- scores


def _score(params, loss, windows=None):
  windows = windows or _windows()
  load = scoring.load_of(TINY, params, windows, 4)
  return scoring.score(TINY, params, windows, loss, load, 4)


def test_whole_model_scores_what_its_logits_say(params):
  windows = _windows()
  found = _score(params, scoring.Loss(0), windows)
  read, wanted = windows.tokens[:4, :-1], windows.tokens[:4, 1:]
  logits = np.asarray(
    forward(TINY, params, jnp.asarray(read), scoring.OPTIONS), np.float64
  )
  p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
  picked = np.take_along_axis(p, wanted[:, :, None], 2)[:, 4:, 0]
  np.testing.assert_allclose(
    found.bits[:4], -np.log2(picked).sum(axis=1), rtol=1e-5
  )
  hits = (p.argmax(axis=2) == wanted)[:, 4:].sum(axis=1)
  assert found.right[:4].tolist() == hits.tolist()
  assert found.bytes.tolist() == 6 * [12]


def test_ways_of_doing_without_experts_differ(params):
  whole = _score(params, scoring.Loss(0)).bits.sum()
  sums = {
    how: _score(params, scoring.Loss(4, scoring.MOST_USED, how)).bits.sum()
    for how in scoring.HOW
  }
  assert len({whole, *sums.values()}) == 4


def test_losing_what_is_never_chosen_costs_nothing():
  config = dataclasses.replace(TINY, router_bias=True)
  params = _random(config)
  moe = params["groups"][0]["moe"]
  moe["router_bias"] = jnp.zeros((1, 8)).at[0, 5].set(-1e4)
  windows, five = _windows(most=2), np.eye(8)[None, 5]  # said to be the busiest
  whole = scoring.score(config, params, windows, scoring.Loss(0), five, 2)
  loss = scoring.Loss(1, scoring.MOST_USED, scoring.DROP)
  found = scoring.score(config, params, windows, loss, five, 2)
  assert found.bits.tolist() == whole.bits.tolist()


def test_intervals_resample_documents():
  bits, ones = np.repeat([1.0, 3.0], 20), np.ones(40)
  each, halves = np.arange(40), np.repeat([0, 1], 20)
  apart = scoring.interval(bits, ones, each, 0)
  together = scoring.interval(bits, ones, halves, 0)
  assert apart[0] == together[0] == 2.0
  assert together[1:] == (1.0, 3.0)
  assert 1.5 < apart[1] < 2.0 < apart[2] < 2.5
  assert apart == scoring.interval(bits, ones, each, 0)
  # One document alone: its windows are resampled.
  assert scoring.interval(bits, ones, 0 * each, 0) == apart


# -- the command


def test_command_scores_every_cell_once(
  checkpoint, tmp_path, capsys, monkeypatch
):
  config, workdir = _config(checkpoint, tmp_path), tmp_path / "out"
  rows = lost_experts.run(config, workdir)
  assert len(rows) == 1 + 2 * 6  # 0, then 1/8 and 1/2
  assert rows[0].lost == "0"
  assert all(row.bits[1] <= row.bits[0] <= row.bits[2] for row in rows)
  for name in ("table.md", "table.csv", "table.tex", "provenance.json"):
    assert (workdir / name).stat().st_size
  assert (workdir / "lost_experts.pdf").read_bytes().startswith(b"%PDF")
  assert (workdir / "lost_experts.png").read_bytes().startswith(b"\x89PNG")
  csv = (workdir / "table.csv").read_text().splitlines()
  assert len(csv) == 1 + len(rows)
  assert repr(rows[3].more_bits[0]) in csv[4]
  assert "english, 1/2 most used masked lost" in capsys.readouterr().out
  # Again: one cell is gone and is the only one that is scored.
  lost = workdir / "cells" / "english-4-most_used-dropped.json"
  kept = lost.read_text()
  lost.unlink()
  real, scored = scoring.score, []

  def counting(*args):
    scored.append(args[3])
    return real(*args)

  monkeypatch.setattr(scoring, "score", counting)
  assert lost_experts.run(config, workdir) == rows
  assert [loss.name for loss in scored] == ["4-most_used-dropped"]
  assert lost.read_text() == kept


def test_other_windows_need_another_folder(checkpoint, tmp_path):
  workdir = tmp_path / "out"
  changes = {"fractions": "0", "windows": 2}
  lost_experts.run(_config(checkpoint, tmp_path, **changes), workdir)
  other = _config(checkpoint, tmp_path, **changes, context=12)
  with pytest.raises(ValueError, match="choose a new one"):
    lost_experts.run(other, workdir)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"how": "forgotten"}, "how='forgotten': choose from masked"),
    ({"which": ""}, "which='': choose from most used"),
    ({"warmup": 16}, "warmup=16: 0 to 15"),
    ({"windows": 0}, "windows=0: at least 1"),
    ({"texts": "", "domains": "poems"}, "domains='poems'"),
    ({"texts": "absent.txt"}, "absent.txt can't be read"),
    ({"checkpoint": "absent"}, "no checkpoint there"),
    ({"fractions": "7/8"}, "a token needs 2"),
  ],
)
def test_bad_input_writes_nothing(checkpoint, tmp_path, changes, match):
  config = _config(checkpoint, tmp_path, **changes)
  with pytest.raises(ValueError, match=match):
    lost_experts.run(config, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_a_model_of_other_tokens_needs_a_tokenizer(params, tmp_path):
  config = dataclasses.replace(TINY, vocab_size=300)
  folder = tmp_path / "words"
  save_checkpoint(folder, config, _random(config))
  with pytest.raises(ValueError, match="vocab_size=300.*there are 256"):
    lost_experts.load_model(str(folder), "float32")


def test_digest_is_kept(checkpoint, tmp_path):
  config = _config(checkpoint, tmp_path, fractions="0", windows=2)
  lost_experts.run(config, tmp_path / "out")
  kept = json.loads((tmp_path / "out" / "config.json").read_text())
  assert len(kept["digest"]) == 16


def test_published_checkpoints_count_tokens_and_bytes(params, tmp_path):
  tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
  from third_party.huggingface.save import save_huggingface

  untied = dataclasses.replace(TINY, tied_embeddings=False, vocab_size=300)
  folder = tmp_path / "mixtral"
  save_huggingface(folder, untied, _random(untied), "mixtral")
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator([8 * TEXT], vocab_size=300)
  bpe.save(str(folder / "tokenizer.json"))
  config = _config(folder, tmp_path, fractions="0", windows=4)
  (row,) = lost_experts.run(config, tmp_path / "out")
  kept = json.loads((tmp_path / "out/cells/english-whole.json").read_text())
  tokens, nbytes = sum(kept["tokens"]), sum(kept["bytes"])
  assert tokens < nbytes  # tokens of several bytes
  assert row.token_bits[0] * tokens == pytest.approx(row.bits[0] * nbytes)
  table = (tmp_path / "out/table.md").read_text()
  assert "bits per token" in table
  assert "next-token accuracy" in table


def test_a_published_checkpoint_without_tokenizer_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
  with pytest.raises(ValueError, match="tokenizer.json is missing"):
    lost_experts.load_model(str(tmp_path), "float32")
