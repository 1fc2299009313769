"""`rm.generate`: text from a model, through faults if there are any."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax

from resilient_moe.faults import parse_schedule
from resilient_moe.model.checkpoint import save_checkpoint
from resilient_moe.model.config import ModelConfig
from resilient_moe.report import Event, read_history
from resilient_moe.runtime.case import Case, make_policy
from resilient_moe.runtime.gateway import run_case
from resilient_moe.runtime.inline import serve_inline
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import refusal
from resilient_moe.serving.workload import decode, encode

Prompt = str | Sequence[int]


class Tokenizer(Protocol):
  """What turns text into a model's tokens and back (`rm.Tokenizer`)."""

  stop: tuple[int, ...]  # tokens that end an answer

  def encode(self, text: str) -> tuple[int, ...]:
    """Tokens of a text."""

  def decode(self, tokens: Iterable[int]) -> str:
    """Text of some tokens."""


@dataclasses.dataclass(frozen=True)
class Generation:
  """One answer."""

  prompt_tokens: tuple[int, ...]
  output_tokens: tuple[int, ...]
  finish_reason: str  # length, stop, or why it failed
  decoder: Callable[[Iterable[int]], str] = dataclasses.field(
    default=decode, repr=False, compare=False
  )

  @property
  def text(self) -> str:
    """The output as text, by the tokenizer or as bytes."""
    return self.decoder(self.output_tokens)


def generate(
  config: ModelConfig,
  params: dict[str, Any],
  prompts: Sequence[Prompt],
  *,
  max_new_tokens: int = 64,
  ranks: int = 1,
  policy: str = "none",
  faults: Sequence[Mapping[str, Any]] = (),
  temperature: float = 0.0,
  seed: int = 0,
  stop: Sequence[int] | None = None,
  tokenizer: Tokenizer | None = None,
  policy_kwargs: Mapping[str, Any] | None = None,
  options: Mapping[str, Any] | None = None,
) -> list[Generation]:
  """Serves prompts on `ranks` ranks, loses what `faults` says, recovers.

  On CPU an engine process of its own emulates one device a rank; on one GPU
  or TPU the ranks are logical and live in this process.

  Args:
    config: the model.
    params: its parameters (`init_params`, `load_checkpoint`,
      `load_huggingface`).
    prompts: token ids, or text: for the tokenizer, or a byte-level model.
    max_new_tokens: how many tokens each answer may have.
    ranks: expert-parallel size.
    policy: a recovery policy's name or dotted path.
    faults: e.g. `{"kind": "rank_lost", "ranks": [3], "at_step": 20}`.
    temperature: 0 is greedy.
    seed: of the first prompt's sampling; each further one adds 1.
    stop: token ids that end an answer; None: those that the tokenizer names,
      or none.
    tokenizer: of the checkpoint, `rm.Tokenizer(path)`; None: a token is a byte.
    policy_kwargs: keywords of the policy.
    options: fields of `StepOptions`.

  Returns:
    One `Generation` a prompt, in order.

  Raises:
    ValueError: bad input; names the value, the limit and the choices.
    RunFailed: the policy could not recover.
  """
  if stop is None:
    stop = tokenizer.stop if tokenizer else ()
  to_tokens = tokenizer.encode if tokenizer else encode
  requests = _requests(
    prompts, to_tokens, max_new_tokens, temperature, seed, stop
  )
  used = _options(requests, ranks, options or {})
  for r in requests:
    reason = refusal(r, used["max_len"], config.vocab_size)
    if reason is not None:
      raise ValueError(f"prompt {r.request_id}: {reason}")
  with tempfile.TemporaryDirectory() as scratch:
    checkpoint = pathlib.Path(scratch) / "model"
    save_checkpoint(checkpoint, config, params)
    emulated = jax.default_backend() == "cpu"
    case = Case(
      str(checkpoint), policy, dict(policy_kwargs or {}), "generate", seed,
      "emulated" if emulated else "logical", "collocated", ranks, used,
      requests, (), wait_ready=bool(faults),
    )  # fmt: skip
    n = ranks + make_policy(case).spares
    case = dataclasses.replace(
      case, faults=parse_schedule([dict(f) for f in faults], n)
    )
    events = _events(case, pathlib.Path(scratch) / "run", emulated)
  return _answers(requests, events, tokenizer.decode if tokenizer else decode)


def _requests(
  prompts: Sequence[Prompt],
  to_tokens: Callable[[str], tuple[int, ...]],
  max_new_tokens: int,
  temperature: float,
  seed: int,
  stop: Sequence[int],
) -> tuple[Request, ...]:
  if isinstance(prompts, str):
    raise ValueError("prompts is one string; give a list of prompts")
  tokens = [
    to_tokens(p) if isinstance(p, str) else tuple(int(t) for t in p)
    for p in prompts
  ]
  return tuple(
    Request(
      f"r{i:04d}", prompt, max_new_tokens, seed + i, temperature, tuple(stop)
    )
    for i, prompt in enumerate(tokens)
  )


def _options(
  requests: tuple[Request, ...], ranks: int, given: Mapping[str, Any]
) -> dict[str, Any]:
  """Room for every prompt, unless the caller says otherwise."""
  longest = max((len(r.prompt) + r.max_new_tokens for r in requests), default=1)
  fitting = {
    "rows": min(8, max(1, -(-len(requests) // max(ranks, 1)))),
    "max_len": longest,
  }
  return {**fitting, **given}


def _events(case: Case, folder: pathlib.Path, emulated: bool) -> list[Event]:
  if not emulated:
    return list(serve_inline(case))
  run_case(case, folder)
  return read_history(folder / "history.jsonl")


def _answers(
  requests: tuple[Request, ...], events: list[Event],
  to_text: Callable[[Iterable[int]], str],
) -> list[Generation]:  # fmt: skip
  """Each prompt's answer; a retried one's is its last attempt's."""
  tokens: dict[str, list[int]] = {}
  reasons: dict[str, str] = {}
  for e in events:
    if e["event"] == "step":
      for name, _, token in e["emitted"]:
        tokens.setdefault(name, []).append(token)
    elif e["event"] in ("finished", "failed"):
      reasons[e["request_id"]] = e["reason"]
  answers = []
  for request in requests:
    root = request.request_id
    attempts = [n for n in reasons if n.partition("~")[0] == root]
    last = attempts[-1] if attempts else root
    answers.append(Generation(
      request.prompt, tuple(tokens.get(last, ())), reasons.get(last, "lost"),
      to_text,
    ))  # fmt: skip
  return answers
