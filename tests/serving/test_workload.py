"""Prompts are real held-out text; requests repeat, and fit their limits."""

import itertools
import statistics
from pydoc_data.topics import topics

import pytest

from resilient_moe.serving import workload

HELD_OUT = "\n\n".join(
  text.strip()
  for name, text in sorted(topics.items())
  if workload.held_out(name)
)


def test_the_split_is_a_rule_on_the_name():
  """The names are fixed: a model trained under another split would leak."""
  held = {name for name in topics if workload.held_out(name)}
  assert {"comparisons", "function", "objects", "identifiers"} <= held
  assert not workload.held_out("async")
  assert 0.05 < len(held) / len(topics) < 0.2


@pytest.mark.parametrize("text", ["", "plain", "naïve “quotes” – 雪\n\tend "])
def test_text_survives_the_tokenizer(text):
  tokens = workload.encode(text)
  assert tokens[0] == workload.BOS
  assert workload.decode(tokens) == text
  assert all(0 <= token < workload.VOCABULARY for token in tokens)


def test_half_a_character_shows_as_a_replacement():
  assert workload.decode(workload.encode("é")[:-1]) == "\ufffd"


def test_what_is_no_text_and_no_token_is_refused():
  with pytest.raises(ValueError, match="NUL character at 2"):
    workload.encode("ab\0c")
  with pytest.raises(ValueError, match="token 256 is not a byte; .* 0 to 255"):
    workload.decode([65, 256])


def test_prompts_are_held_out_text_cut_at_words(seed):
  prompts = workload.text_prompts(200, seed, (24, 80))
  assert len(prompts) == 200
  for prompt in prompts:
    assert 24 <= len(workload.encode(prompt)) <= 80
    assert prompt == prompt.strip()
    before, _, after = HELD_OUT.partition(prompt)
    assert before == "" or before[-1].isspace()
    assert after == "" or after[0].isspace()


def test_prompts_repeat_with_their_seed(seed):
  prompts = workload.text_prompts(30, seed)
  assert prompts == workload.text_prompts(30, seed)
  assert prompts != workload.text_prompts(30, seed + 1)
  assert len(set(prompts)) == 30


def test_long_prompts_go_on_into_the_next_document():
  for prompt in workload.text_prompts(4, 0, (40_000, 41_000)):
    assert 40_000 <= len(workload.encode(prompt)) <= 41_000


def test_requests_stay_in_their_limits(seed):
  requests = workload.make_requests(
    count=60,
    prompt_tokens=(20, 60),
    new_tokens=(5, 9),
    temperatures=(0.0, 0.8),
    seed=seed,
  )
  assert len({request.request_id for request in requests}) == 60
  assert len({request.seed for request in requests}) == 60
  assert {request.temperature for request in requests} == {0.0, 0.8}
  assert {request.max_new_tokens for request in requests} == {5, 6, 7, 8, 9}
  assert all(20 <= len(request.prompt) <= 60 for request in requests)
  assert all(request.prompt[0] == workload.BOS for request in requests)
  assert all(request.arrival_step == 0 for request in requests)


def test_requests_repeat_with_their_seed(seed):
  first, again, other = (
    workload.make_requests(count=5, arrivals="poisson", rate=3.0, seed=s)
    for s in (seed, seed, seed + 1)
  )
  assert first == again
  assert first != other


def test_arrivals_by_step_are_even():
  requests = workload.make_requests(count=6, rate=0.5)
  assert [request.arrival_step for request in requests] == [0, 2, 4, 6, 8, 10]
  assert all(request.arrival_s is None for request in requests)


def test_poisson_arrivals_have_their_rate(seed):
  requests = workload.make_requests(
    count=2000, arrivals="poisson", rate=4.0, seed=seed
  )
  times = [request.arrival_s for request in requests]
  gaps = [b - a for a, b in itertools.pairwise(times)]
  assert min(gaps) >= 0
  # Exponential gaps: mean and deviation are both 1 / rate (2,000 samples).
  assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.15)
  assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.2)
  assert all(request.arrival_step is None for request in requests)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"count": -1}, "count is -1; needed is an integer from 0"),
    ({"prompt_tokens": (90, 20)}, r"prompt_tokens is \(90, 20\); needed"),
    ({"prompt_tokens": (1, 20)}, "with 2 <= min <= max"),
    ({"new_tokens": (0, 5)}, r"new_tokens is \(0, 5\); needed .* 1 <= min"),
    ({"temperatures": ()}, "needed is at least one"),
    ({"temperatures": (0.5, -1)}, r"\(0.5, -1\); needed .* none below 0"),
    ({"arrivals": "bursts"}, "'bursts'; choose from steps, poisson"),
    ({"rate": 0}, "rate is 0; needed is a number above 0"),
    ({"rate": float("nan")}, "rate is nan"),
  ],
)
def test_bad_workloads_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    workload.make_requests(**({"count": 3} | changes))


def test_a_length_at_which_nothing_ends_is_refused(monkeypatch):
  monkeypatch.setattr(workload, "_held_out_text", lambda: (b"Aaaa bbb ", [0]))
  with pytest.raises(ValueError, match=r"\(7, 7\): too few .* widen"):
    workload.text_prompts(1, 0, (7, 7))
