"""Prompts as text, through a checkpoint's tokenizer.json."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest

import resilient_moe as rm
from experiments import cases
from experiments.settings import read
from resilient_moe.serving.workload import make_requests, tokenized_prompts
from tests.experiments.run_fake import tiny
from tests.model.harness import tiny_params
from third_party import huggingface as hf

tokenizers = pytest.importorskip(
  "tokenizers", reason="needs tokenizers: pip install .[text]"
)
TEXT = "The module defines an exception that is raised by the parser. " * 3
CONFIG = rm.ModelConfig(
  vocab_size=320, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16,
  n_experts=4, expert_width=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
  """A tiny Mixtral with a byte-level BPE of 320 tokens."""
  path = tmp_path_factory.mktemp("text") / "model"
  rm.save_huggingface(path, CONFIG, tiny_params(CONFIG), "mixtral")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  made.train_from_iterator([TEXT], trainer)
  made.post_processor = tokenizers.processors.TemplateProcessing(
    "<s> $A", special_tokens=[("<s>", 0)]
  )
  made.save(str(path / "tokenizer.json"))
  (path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
  return path


def test_text_becomes_tokens_and_text_again(folder):
  tokenizer = rm.Tokenizer(folder)
  tokens = tokenizer.encode("raised by größe")
  assert tokens[0] == 0
  assert len(tokens) < len("raised by größe".encode())
  assert tokenizer.decode(tokens).strip() == "raised by größe"
  assert 256 < tokenizer.vocab_size <= CONFIG.vocab_size


def test_stop_tokens_are_those_that_a_file_names(folder, tmp_path):
  assert rm.Tokenizer(folder).stop == (1, 7)
  assert hf.stop_tokens(tmp_path) == ()
  (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
  assert hf.stop_tokens(tmp_path) == (3,)
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
  with pytest.raises(ValueError, match="eos_token_id='x': needed is a token"):
    hf.stop_tokens(tmp_path)


def greedy(config, params, prompt: tuple[int, ...], count: int) -> list[int]:
  """By whole sequences: what follows doesn't change what came before."""
  tokens = list(prompt)
  for _ in range(count):
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = rm.forward(config, params, padded)
    tokens.append(int(np.asarray(logits)[0, len(tokens) - 1].argmax()))
  return tokens[len(prompt) :]


def test_generate_takes_text_and_stops(folder):
  """At the tokenizer's stop tokens, where no others are given."""
  config, params = rm.load_huggingface(folder)
  tokenizer = rm.Tokenizer(folder)
  prompts = ["The module", "raised by the parser"]
  want = [greedy(config, params, tokenizer.encode(p), 8) for p in prompts]
  tokenizer.stop = (want[0][2],)
  answers = rm.generate(
    config, params, prompts, max_new_tokens=8, tokenizer=tokenizer
  )
  for prompt, answer, full in zip(prompts, answers, want, strict=True):
    assert answer.prompt_tokens == tokenizer.encode(prompt)
    ends = [i for i, t in enumerate(full) if t in tokenizer.stop]
    expected = full[: ends[0] + 1] if ends else full
    assert list(answer.output_tokens) == expected
    assert answer.finish_reason == ("stop" if ends else "length")
    assert answer.text == tokenizer.decode(answer.output_tokens)


def test_a_workload_is_cut_into_tokens(folder):
  tokenizer = rm.Tokenizer(folder)
  source = tokenized_prompts(tokenizer.encode)
  made = [
    make_requests(count=20, prompt_tokens=(5, 30), seed=s, prompts=source)
    for s in (3, 3, 4)
  ]
  assert made[0] == made[1] != made[2]
  lengths = {len(r.prompt) for r in made[0]}
  assert min(lengths) >= 5
  assert max(lengths) <= 30
  assert len(lengths) > 5
  assert all(r.prompt[0] == 0 for r in made[0])
  words = tokenizer.decode(made[0][0].prompt)
  assert "\N{REPLACEMENT CHARACTER}" not in words
  assert len(words) > len(made[0][0].prompt)  # not a byte a token


def test_the_launcher_uses_the_tokenizer_or_draws_tokens(folder, tmp_path):
  settings = read(tiny(tmp_path))
  with_text = dataclasses.replace(settings, checkpoint=str(folder))
  job, *_ = cases.jobs(with_text)
  assert all(r.prompt[0] == 0 for r in job.case.requests)
  bare = tmp_path / "bare"
  rm.save_huggingface(bare, CONFIG, tiny_params(CONFIG), "mixtral")
  drawn, *_ = cases.jobs(dataclasses.replace(settings, checkpoint=str(bare)))
  tokens = np.concatenate([r.prompt for r in drawn.case.requests])
  assert tokens.max() < 320
  assert len(set(tokens.tolist())) > 20
  assert job.digest != drawn.digest
  # Another dtype is another run; the wrong one is refused.
  low = dataclasses.replace(with_text, dtype="bfloat16")
  assert next(iter(cases.jobs(low))).digest != job.digest
  with pytest.raises(ValueError, match=r"config.checkpoint=.*dtype='int8'"):
    cases.jobs(dataclasses.replace(with_text, dtype="int8"))
  with pytest.raises(ValueError, match="dtype='bfloat16': .* saved as 'float"):
    cases.jobs(dataclasses.replace(settings, dtype="bfloat16"))


def test_without_the_package_or_the_file(folder, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match=r"tokenizer.json is missing; prompts"):
    rm.Tokenizer(tmp_path)
  (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 1}))
  with pytest.raises(ValueError, match="tokenizer.json: not readable"):
    rm.Tokenizer(tmp_path)
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"resilient-moe\[text\]; or give"):
    rm.Tokenizer(folder)
