"""The benchmark against `transformers`, on a tiny model."""

import json

import numpy as np
import pytest

from configs import bench_reference as config_file
from experiments import bench_reference
from experiments.bench_reference_sides import Ours
from resilient_moe.model.config import ModelConfig, StepOptions

TORCH = "the reference needs torch and transformers (extra `test`)"


SMALL = ModelConfig(
  vocab_size=64, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1,
  head_dim=16, n_experts=4, top_k=2, expert_width=16,
)  # fmt: skip


def _config(**changes):
  config = config_file.get_config()
  config.model.update(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    intermediate_size=32,
  )
  config.update(
    batches="2",
    prefills="12",
    context=8,
    block_steps=2,
    chunk=8,
    prefill_rows=2,
    pairs=2,
    tries=1,
    experts_implementations="eager",
    scaling_experts="4",
    scaling_rows=2,
    scaling_chunk=8,
    targets={"decode, batch 2": 1e9, "prefill, 12 tokens": 0.0},
  )
  config.update(changes)
  return config


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_sides_choose_the_same_tokens(tmp_path, capsys):
  pytest.importorskip("torch", reason=TORCH)
  pytest.importorskip("transformers", reason=TORCH)
  result = bench_reference.run(_config(), tmp_path)
  assert [row["case"] for row in result.rows] == [
    "decode, batch 2",
    "prefill, 12 tokens",
  ]
  assert [row["tokens alike"] for row in result.rows] == [1.0, 1.0]
  assert result.rows[0]["reference's settings"].startswith("eager, ")
  assert [target.met for target in result.targets] == [False, True]
  kept = json.loads((tmp_path / "bench_reference.json").read_text())
  for target in result.targets:
    case = target.what.partition(":")[0]
    ours, theirs = (kept["samples"][f"{case}/{s}"] for s in ("ours", "theirs"))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    assert target.measured == pytest.approx(np.median(ratios))
  assert len(kept["samples"]["decode, batch 2/ours"]) == 2
  assert {"held 4/decode", "held 4/chunk"} <= set(kept["samples"])
  assert "decode, batch 2" in (tmp_path / "bench_reference.md").read_text()
  assert "times" in capsys.readouterr().out


def test_our_side_prefills_in_chunks_and_decodes_on():
  config, options = SMALL, StepOptions(rows=2, max_len=16, chunk=8)
  params = bench_reference._random(config)
  prompt = np.random.default_rng(0).integers(0, 64, 12)
  side = Ours(config, params, options)
  token = side.prefill(1, prompt)
  # The prompt's last token decoded gives what its prefill gave.
  side.prefill(0, prompt[:-1])
  side.prefill(1, prompt[:-1])
  again = side.decode(np.array([prompt[-1], prompt[-1]]), 11)
  assert again.tolist() == [token, token]


def test_hidden_experts_of_our_side_are_not_chosen():
  config, options = SMALL, StepOptions(rows=2, max_len=16, chunk=8)
  params = bench_reference._random(config)
  loud = {name: x.copy() for name, x in params["experts"].items()}
  loud["down"][:, :2] *= 100
  sides = [
    Ours(config, {**params, "experts": experts}, options)
    for experts in (params["experts"], loud)
  ]

  def chosen() -> list[list[int]]:
    tokens = np.arange(12).reshape(6, 2)
    return [
      np.concatenate([side.decode(pair, 0) for pair in tokens]).tolist()
      for side in sides
    ]

  first, second = chosen()
  assert first != second
  for side in sides:
    side.mask(np.array([True, True, False, False]))
  first, second = chosen()
  assert first == second


def test_reference_is_taken_at_its_fastest(monkeypatch):
  spent = {"slow": 3.0, "fast": 1.0, "never": 9.0, "batched_mm": 0.5}
  clock = [0.0]

  class Side:
    def __init__(self, model, experts, cache):
      self.experts = experts

  class Model:
    chosen = ""

    def set_experts_implementation(self, name):
      self.chosen = name

  def work(side):
    def call():
      clock[0] += spent[side.experts]

    return call

  monkeypatch.setattr(bench_reference, "Theirs", Side)
  monkeypatch.setattr(
    bench_reference.time, "perf_counter", lambda: clock[0]
  )
  settings = _config(
    experts_implementations="slow,fast,never,batched_mm", caches="dynamic",
    tries=2, batched_rows=4,
  )  # fmt: skip
  model = Model()
  side, name = bench_reference._fastest(settings, model, 5, work)
  assert (side.experts, name) == ("fast", "fast, dynamic cache")
  assert model.chosen == "fast"
  assert clock[0] == 3.0 * 2 + 1.0 * 2 + 9.0  # hopeless ones run once
  # What copies the weights of each row's experts is for few rows only.
  side, _ = bench_reference._fastest(settings, model, 4, work)
  assert side.experts == "batched_mm"


@pytest.fixture
def fake_clock(monkeypatch):
  """Seconds that only a test's own calls spend."""
  clock = [0.0]
  monkeypatch.setattr(
    bench_reference.time, "perf_counter", lambda: clock[0]
  )
  return clock


def test_blocks_take_turns_and_the_first_pair_warms_up(fake_clock):
  calls = []

  def spend(name, seconds):
    def call():
      first = name not in calls
      calls.append(name)
      fake_clock[0] += 50.0 if first else seconds

    return call

  case = bench_reference.Case(
    "c", spend("ours", 1.0), spend("theirs", 3.0), spend("before", 7.0), 12,
    "eager",
  )  # fmt: skip
  assert bench_reference.alternate(case, 3) == ([1.0] * 3, [3.0] * 3)
  assert calls[::2] == ["before"] * 8  # not timed
  assert calls[1::2] == 2 * ["theirs", "ours", "ours", "theirs"]


def test_a_row_says_how_many_times_faster_we_are(monkeypatch, fake_clock):
  def spend(seconds):
    fake_clock[0] += seconds

  def case(settings, config, params, model, size):
    made = bench_reference.Case(
      f"case {size}", lambda: spend(1.0), lambda: spend(3.0), lambda: None,
      12, "eager",
    )  # fmt: skip
    return made, 0.5

  monkeypatch.setattr(bench_reference, "decode_case", case)
  monkeypatch.setattr(bench_reference, "prefill_case", case)
  rows = list(bench_reference.compare(_config(), None, None, None))
  assert [row["case"] for row, _ in rows] == ["case 2", "case 12"]
  for row, _ in rows:
    assert row["ratio"] == "3.00 [3.00, 3.00]"
    assert (row["ours, tokens/s"], row["reference, tokens/s"]) == (12.0, 4.0)
    assert row["tokens alike"] == 0.5


def test_a_decode_block_is_waited_for_and_its_tokens_are_compared(monkeypatch):
  done = []

  class Us:
    def __init__(self, *args):
      pass

    def prefill(self, row, prompt):
      return row

    def decode(self, tokens, position):
      done.append(position)
      return tokens + 1

    def wait(self):
      done.append("wait")

  class Them:
    def start(self, prompts, room):
      self.tokens = np.arange(len(prompts))
      return self.tokens

    def decode(self, tokens):
      return np.array([tokens[0] + 1, -1])  # the second row goes wrong

    def rewind(self):
      pass

  monkeypatch.setattr(bench_reference, "Ours", Us)
  monkeypatch.setattr(
    bench_reference, "_fastest", lambda *args: (Them(), "eager, static cache")
  )
  case, alike = bench_reference.decode_case(_config(), None, None, None, 2)
  assert alike == 4 / 6  # the first tokens, and one row of two steps
  assert case.tokens == 2 * 2
  done.clear()
  case.ours()
  assert done == [8, 9, "wait"]


def test_few_of_the_experts_held_may_be_chosen(monkeypatch):
  hidden = []

  class Us:
    def __init__(self, config, params, options):
      assert params["experts"]["down"].shape[1] == config.n_experts

    def mask(self, masked):
      hidden.append(masked.tolist())

    def decode(self, tokens, position):
      return tokens

    def prefill(self, row, prompt):
      return 0

  monkeypatch.setattr(bench_reference, "Ours", Us)
  config = ModelConfig(
    vocab_size=64, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1,
    head_dim=16, n_experts=4, top_k=2, expert_width=16,
  )  # fmt: skip
  rows, samples = bench_reference.held_experts(
    _config(scaling_experts="4,8"), config
  )
  assert hidden == [[False] * 4, [False] * 4 + [True] * 4]
  assert [(row["held"], row["may be chosen"]) for row in rows] == [
    (4, 4), (8, 4),
  ]  # fmt: skip
  assert len(samples["held 8/chunk"]) == 2


@pytest.mark.parametrize("value", ["0", "a", "1,-2"])
def test_bad_sizes_are_named(value, tmp_path):
  with pytest.raises(ValueError, match="batches=.*integers from 1"):
    bench_reference.run(_config(batches=value), tmp_path / "out")
  assert not (tmp_path / "out").exists()
