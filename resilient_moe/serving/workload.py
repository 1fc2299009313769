"""Workloads: real text prompts, and requests that arrive over time.

The text is what every Python carries (`pydoc_data.topics`), so nothing is
downloaded. For our own models a token is a byte; byte 0 begins a document and
so every prompt. Others come with a tokenizer, or get tokens drawn at random.
Text differs a little between Python versions: runs are compared within one.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pydoc_data import topics as pydoc_topics

from resilient_moe.serving.request import Request

VOCABULARY = 256
BOS = 0  # begins a document; no text holds it
ARRIVALS = ("steps", "poisson")

Tokens = tuple[int, ...]
# (count, seed, least and most tokens of a prompt) -> prompts
PromptSource = Callable[[int, int, tuple[int, int]], list[Tokens]]

_SENTENCE = re.compile(rb"(?:[.:]\s+|\n\n)([A-Z][a-z]* )")
_BYTES_A_TOKEN = 8  # more than tokenizers need for English
_TRIES = 100  # draws a prompt; only a range of a few tokens needs many


def held_out(name: str) -> bool:
  """Whether the document of this name is kept from training (one in ten).

  A rule on the name alone: training and serving agree without sharing data.
  """
  return int(hashlib.sha1(name.encode()).hexdigest(), 16) % 10 == 0


def encode(text: str) -> tuple[int, ...]:
  """Tokens of a text, with the byte that begins a document in front."""
  if "\0" in text:
    raise ValueError(
      f"text holds the NUL character at {text.index(chr(0))}; it is reserved "
      "for the beginning of a document"
    )
  return (BOS, *text.encode("utf-8"))


def decode(tokens: Iterable[int]) -> str:
  """Text of some tokens; what is not UTF-8 shows as U+FFFD."""
  tokens = [token for token in tokens if token != BOS]
  for token in tokens:
    if not 0 <= token < VOCABULARY:
      raise ValueError(
        f"token {token} is not a byte; the choices are 0 to {VOCABULARY - 1}"
      )
  return bytes(tokens).decode("utf-8", errors="replace")


def text_prompts(
  count: int, seed: int = 0, prompt_tokens: tuple[int, int] = (32, 96)
) -> list[str]:
  """Passages of held-out documentation, from a sentence's first word on.

  They end where a word ends; a long one goes on into the next document.

  Args:
    count: how many.
    seed: equal seeds give equal prompts (with one version of Python).
    prompt_tokens: least and most tokens of a prompt, the first byte included.

  Returns:
    The texts; `encode` makes prompts of them.
  """
  if count < 0:
    raise ValueError(f"count is {count}; needed is an integer from 0")
  _check_range("prompt_tokens", prompt_tokens, least=2)
  least, most = (tokens - 1 for tokens in prompt_tokens)
  text, starts = _held_out_text()
  text *= 2 + most // len(text)  # from any start there is enough
  rng = random.Random(f"prompts/{seed}")
  rng.shuffle(starts)  # dealt like cards: no repeats before all were seen
  prompts: list[str] = []
  for start in itertools.islice(itertools.cycle(starts), _TRIES * count):
    passage = _cut(text, start, rng.randint(least, most))
    if len(passage) >= least:
      prompts.append(passage.decode("utf-8"))
    if len(prompts) == count:
      return prompts
  if count:
    raise ValueError(
      f"prompt_tokens is {prompt_tokens}: too few passages of that length end "
      "with a word; widen the range"
    )
  return prompts


def byte_prompts(
  count: int, seed: int, prompt_tokens: tuple[int, int]
) -> list[Tokens]:
  """Text for a byte-level model."""
  return [encode(text) for text in text_prompts(count, seed, prompt_tokens)]


def tokenized_prompts(to_tokens: Callable[[str], Tokens]) -> PromptSource:
  """The same text through a tokenizer, each prompt cut at its length."""

  def source(
    count: int, seed: int, prompt_tokens: tuple[int, int]
  ) -> list[Tokens]:
    _check_range("prompt_tokens", prompt_tokens, least=1)
    text, starts = _held_out_text()
    rng = random.Random(f"prompts/{seed}")
    rng.shuffle(starts)
    prompts: list[Tokens] = []
    for start in itertools.islice(itertools.cycle(starts), count):
      length = rng.randint(*prompt_tokens)
      passage = _BYTES_A_TOKEN * length
      tokens: Tokens = ()
      while len(tokens) < length:
        if start + passage > len(text):
          start, text = start % len(text), text + text
        piece = text[start : start + passage].decode("utf-8", "ignore")
        tokens, passage = to_tokens(piece)[:length], 2 * passage
      prompts.append(tokens)
    return prompts

  return source


def random_prompts(vocab_size: int) -> PromptSource:
  """Tokens drawn at random, for a model that has no tokenizer with it."""

  def source(
    count: int, seed: int, prompt_tokens: tuple[int, int]
  ) -> list[Tokens]:
    _check_range("prompt_tokens", prompt_tokens, least=1)
    rng = random.Random(f"prompts/{seed}")
    return [
      tuple(rng.randrange(vocab_size) for _ in range(rng.randint(*bounds)))
      for bounds in [prompt_tokens] * count
    ]

  return source


def make_requests(
  *,
  count: int,
  prompt_tokens: tuple[int, int] = (32, 96),
  new_tokens: tuple[int, int] = (32, 96),
  temperatures: Sequence[float] = (0.0,),
  arrivals: str = "steps",
  rate: float | None = None,
  seed: int = 0,
  prompts: PromptSource = byte_prompts,
) -> tuple[Request, ...]:
  """Requests with text prompts; keyword arguments as in a config.

  Args:
    count: how many requests.
    prompt_tokens: least and most tokens of a prompt.
    new_tokens: least and most tokens asked for.
    temperatures: each request draws one; 0 is greedy.
    arrivals: `steps` (evenly, counted in engine steps: the same on every
      machine) or `poisson` (at random, in seconds).
    rate: requests a step, or a second; without one all are there at once.
    seed: equal seeds give equal requests.
    prompts: where they come from (not of a config: the model decides).

  Returns:
    The requests, in order of arrival.
  """
  _check_range("new_tokens", new_tokens, least=1)
  _check_temperatures(temperatures)
  if arrivals not in ARRIVALS:
    raise ValueError(
      f"unknown arrivals {arrivals!r}; choose from {', '.join(ARRIVALS)}"
    )
  if rate is not None and not rate > 0:
    raise ValueError(f"rate is {rate}; needed is a number above 0, or None")
  rng = random.Random(f"requests/{seed}")
  now_s = 0.0
  requests = []
  for index, prompt in enumerate(prompts(count, seed, prompt_tokens)):
    step, at_s = None, None
    if arrivals == "steps":
      step = int(index / rate) if rate else 0
    else:
      now_s += rng.expovariate(rate) if rate else 0.0
      at_s = now_s
    requests.append(
      Request(
        request_id=f"r{index:04d}",
        prompt=prompt,
        max_new_tokens=rng.randint(*new_tokens),
        seed=rng.getrandbits(31),
        temperature=rng.choice(tuple(temperatures)),
        arrival_step=step,
        arrival_s=at_s,
      )
    )
  return tuple(requests)


def _held_out_text() -> tuple[bytes, list[int]]:
  """All held-out topics in one, and where its sentences begin."""
  topics = sorted(pydoc_topics.topics.items())
  text = "\n\n".join(text.strip() for name, text in topics if held_out(name))
  data = text.encode("utf-8") + b"\n\n"
  return data, [match.start(1) for match in _SENTENCE.finditer(data)]


def _cut(text: bytes, start: int, limit: int) -> bytes:
  """As many whole words from `start` on as `limit` bytes hold."""
  # ASCII white space never splits a character of UTF-8.
  window = text[start : start + limit + 1]
  end = max(window.rfind(space) for space in (b" ", b"\n"))
  return window[: max(end, 0)].rstrip()


def _check_range(name: str, bounds: tuple[int, int], least: int) -> None:
  if len(bounds) != 2 or not least <= bounds[0] <= bounds[1]:
    raise ValueError(
      f"{name} is {bounds}; needed is (min, max) with {least} <= min <= max"
    )


def _check_temperatures(temperatures: Sequence[float]) -> None:
  if not temperatures or not all(t >= 0 for t in temperatures):
    raise ValueError(
      f"temperatures is {tuple(temperatures)}; needed is at least one, none "
      "below 0"
    )
