"""Throughput against `transformers`: same weights, same machine, same run.

  python -m experiments.bench_reference --config=configs/bench_reference.py \
      --workdir=DIR [--config.batches=1,16,64 --config.prefills=512,2048]

The reference runs at its fastest settings: SDPA attention, no gradients, and
of the experts implementations and caches that the config lists the fastest
for each case. Ours is the serving configuration: the transactional step and
the commit, row-invariant, with sampling, as an engine of one rank runs them.
Blocks of both alternate; a ratio is reference seconds over ours (above 1: ours
is faster) of neighbouring blocks. Tokens of both sides are compared.

DIR then holds bench_reference.md, bench_reference.json (samples) and the
weights. Needs torch and transformers. Exit status: 0 (also where a target is
missed: the table says so); 2 for bad input.
"""

import dataclasses
import functools
import gc
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments import bench_record as record
from experiments import launch
from experiments.bench_models import listed
from experiments.bench_reference_sides import Ours, Theirs
from experiments.provenance import provenance
from resilient_moe.model.config import ModelConfig, StepOptions
from resilient_moe.model.params import describe, is_spec
from resilient_moe.report.runs import write_text
from third_party import huggingface

BAD_INPUT = 2
PATIENCE = 3.0  # a setting this much slower than the best isn't tried again


@dataclasses.dataclass(frozen=True)
class Case:
  """Two sides of a comparison: each call is a block of equal work."""

  name: str
  ours: Callable[[], Any]
  theirs: Callable[[], Any]
  before: Callable[[], None]  # between blocks, not timed
  tokens: int  # of a block
  settings: str  # of the reference


def reference_model(settings: Any, folder: pathlib.Path) -> Any:
  """The reference with random weights, written to `folder` for us."""
  import torch
  import transformers

  torch.set_num_threads(settings.threads)
  torch.manual_seed(settings.seed)
  config = transformers.Qwen3MoeConfig(**settings.model.to_dict())
  config._attn_implementation = "sdpa"
  model = transformers.Qwen3MoeForCausalLM(config).eval()
  model.save_pretrained(folder)
  return model


def _fastest(
  settings: Any,
  model: Any,
  rows: int,
  work: Callable[[Theirs], Callable[[], Any]],
) -> tuple[Theirs, str]:
  """The reference with the settings that do `work`, on `rows`, fastest."""
  best: tuple[float, Theirs, str] | None = None
  for experts in listed(settings.experts_implementations):
    if experts == "batched_mm" and rows > settings.batched_rows:
      continue
    for cache in listed(settings.caches):
      side = Theirs(model, experts, cache)
      call, spent = work(side), []
      for _ in range(settings.tries):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
        if best is not None and min(spent) > PATIENCE * best[0]:
          break
      if best is None or min(spent) < best[0]:
        best = min(spent), side, f"{experts}, {cache} cache"
  if best is None:
    raise ValueError("experts_implementations and caches: at least one each")
  experts = best[2].partition(",")[0]
  model.set_experts_implementation(experts)
  return best[1], best[2]


def decode_case(
  settings: Any, config: ModelConfig, params: Any, model: Any, batch: int
) -> tuple[Case, float]:
  """Decoding `batch` sequences; the share of tokens that both choose alike."""
  context, steps = settings.context, settings.block_steps
  prompts = _prompts(settings, batch, context)
  options = StepOptions(
    rows=batch, max_len=context + steps, chunk=min(128, context)
  )
  ours = Ours(config, params, options)
  first = np.array([ours.prefill(i, p) for i, p in enumerate(prompts)])

  def work(side: Theirs) -> Callable[[], Any]:
    token = side.start(prompts, steps + settings.tries + 1)
    return lambda: side.decode(token)

  theirs, name = _fastest(settings, model, batch, work)
  found = theirs.start(prompts, steps + 1)

  def our_block() -> list[np.ndarray]:
    token, seen = first, []
    for step in range(steps):
      token = ours.decode(token, context + step)
      seen.append(token)
    ours.wait()
    return seen

  def their_block() -> list[np.ndarray]:
    token, seen = found, []
    for _ in range(steps):
      token = theirs.decode(token)
      seen.append(token)
    return seen

  theirs.rewind()
  alike = np.mean(np.stack([first, *our_block()]) == [found, *their_block()])
  case = Case(
    f"decode, batch {batch}", our_block, their_block, theirs.rewind,
    batch * steps, name,
  )  # fmt: skip
  return case, float(alike)


def prefill_case(
  settings: Any, config: ModelConfig, params: Any, model: Any, length: int
) -> tuple[Case, float]:
  """A prompt of `length` tokens, alone."""
  prompts = _prompts(settings, 1, length)
  options = StepOptions(
    rows=settings.prefill_rows, max_len=length,
    chunk=min(length, settings.chunk),
  )  # fmt: skip
  ours = Ours(config, params, options)
  theirs, name = _fastest(
    settings, model, length, lambda side: lambda: side.prefill(prompts)
  )

  def our_block() -> None:
    ours.prefill(0, prompts[0])
    ours.wait()

  alike = ours.prefill(0, prompts[0]) == int(theirs.prefill(prompts)[0])
  case = Case(
    f"prefill, {length} tokens", our_block,
    lambda: theirs.prefill(prompts), lambda: None, length,
    name.partition(",")[0],
  )  # fmt: skip
  return case, float(alike)


def _prompts(settings: Any, batch: int, length: int) -> np.ndarray:
  rng = np.random.default_rng(settings.seed)
  vocabulary = settings.model.vocab_size
  return rng.integers(0, vocabulary, (batch, length), np.int64)


def alternate(case: Case, pairs: int) -> tuple[list[float], list[float]]:
  """Seconds of our blocks and of theirs; who begins changes."""
  spent: dict[str, list[float]] = {"ours": [], "theirs": []}
  for pair in range(pairs + 1):
    order = ("ours", "theirs") if pair % 2 else ("theirs", "ours")
    for name in order:
      case.before()
      start = time.perf_counter()
      getattr(case, name)()
      spent[name].append(time.perf_counter() - start)
  return spent["ours"][1:], spent["theirs"][1:]  # the first pair warms up


def compare(
  settings: Any, config: ModelConfig, params: Any, model: Any
) -> Iterator[tuple[dict[str, record.Cell], dict[str, list[float]]]]:
  """A row and the samples of every case."""
  batches, prefills = (integers(settings, k) for k in ("batches", "prefills"))
  for number, size in enumerate(batches + prefills):
    case_of = decode_case if number < len(batches) else prefill_case
    case, alike = case_of(settings, config, params, model, size)
    ours, theirs = alternate(case, settings.pairs)
    ratio = record.stat(record.paired(theirs, ours))
    row: dict[str, record.Cell] = {
      "case": case.name,
      "ours, tokens/s": case.tokens / record.stat(ours).median,
      "reference, tokens/s": case.tokens / record.stat(theirs).median,
      "ratio": record.between(ratio, 2),
      "tokens alike": alike,
      "reference's settings": case.settings,
    }
    print(f"{case.name}: {record.between(ratio, 2)} times", flush=True)
    yield row, {f"{case.name}/ours": ours, f"{case.name}/theirs": theirs}
    del case
    gc.collect()


def integers(settings: Any, key: str) -> list[int]:
  """The positive numbers in "a,b".

  Raises:
    ValueError: one isn't.
  """
  parts = listed(str(settings[key]))
  if any(not part.isdecimal() or not int(part) for part in parts):
    raise ValueError(f"{key}={settings[key]!r}: integers from 1, with commas")
  return [int(part) for part in parts]


def held_experts(
  settings: Any, config: ModelConfig
) -> tuple[list[dict[str, record.Cell]], dict[str, list[float]]]:
  """Our decode step and chunk by experts held, of which 8 can be chosen.

  Times that don't grow with the column "held" show that compute follows the
  tokens. All alternate.
  """
  batch, chunk = settings.scaling_rows, settings.scaling_chunk
  choose = min(integers(settings, "scaling_experts"))
  calls: dict[str, Callable[[], Any]] = {}
  for held in integers(settings, "scaling_experts"):
    wide = dataclasses.replace(config, n_experts=held)
    options = StepOptions(rows=batch, max_len=chunk, chunk=chunk)
    side = Ours(wide, _random(wide), options)
    side.mask(np.arange(held) >= choose)
    prompt, token = _prompts(settings, 1, chunk)[0], np.arange(batch)
    decode = functools.partial(side.decode, token, chunk - 1)
    calls[f"{held}/decode"] = decode
    calls[f"{held}/chunk"] = functools.partial(side.prefill, 0, prompt)
  samples: dict[str, list[float]] = {name: [] for name in calls}
  for call in calls.values():
    call()
  for _ in range(settings.pairs):
    for name, call in calls.items():
      start = time.perf_counter()
      call()
      samples[name].append(time.perf_counter() - start)
  rows: list[dict[str, record.Cell]] = []
  for held in integers(settings, "scaling_experts"):
    row: dict[str, record.Cell] = {"held": held, "may be chosen": choose}
    for kind, what in (
      ("decode", f"decode {batch}, ms"), ("chunk", f"prefill {chunk}, ms")
    ):  # fmt: skip
      milliseconds = [1e3 * s for s in samples[f"{held}/{kind}"]]
      row[what] = record.between(record.stat(milliseconds), 1)
    rows.append(row)
  return rows, {f"held {name}": s for name, s in samples.items()}


def _random(config: ModelConfig) -> Any:
  rng = np.random.default_rng(0)

  def make(spec: Any) -> np.ndarray:
    if not spec.fan_in:
      return np.ones(spec.shape, spec.dtype)
    values = rng.standard_normal(spec.shape, np.float32)
    return (values / np.float32(spec.fan_in**0.5)).astype(spec.dtype)

  return jax.tree.map(make, describe(config), is_leaf=is_spec)


def run(
  settings: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  argv: Sequence[str] = ("bench_reference",),
) -> record.Result:
  """Measures every case; writes and prints what was found."""
  for key in ("batches", "prefills", "scaling_experts"):
    integers(settings, key)
  weights = workdir / "weights"
  weights.mkdir(parents=True, exist_ok=True)
  model = reference_model(settings, weights)
  config, params = huggingface.load_huggingface(weights, "float32")
  rows: list[dict[str, record.Cell]] = []
  samples: dict[str, list[float]] = {}
  for row, found in compare(settings, config, params, model):
    rows.append(row)
    samples |= found
  targets = [
    record.Target(
      f"{name}: times the reference's throughput",
      record.stat(
        record.paired(samples[f"{name}/theirs"], samples[f"{name}/ours"])
      ).median,
      limit, "times", at_most=False,
    )
    for name, limit in settings.targets.to_dict().items()
    if f"{name}/ours" in samples
  ]  # fmt: skip
  del model, params
  gc.collect()
  scaling, more = held_experts(settings, config)
  result = record.Result(
    "bench_reference", rows, samples | more, targets,
    ("ratio: ours over the reference, of throughput; median [95% interval]",),
  )  # fmt: skip
  origin = provenance("experiments.bench_reference", argv, "one device", 1)
  origin["config"] = settings.to_dict()
  record.write(result, workdir, origin)
  parts = [
    f"# Against transformers\n\n`{origin['command']}`\n",
    record.text(result),
    record.table(record.target_rows([result])),
    "\nExperts held, and step times:\n",
    record.table(scaling),
  ]
  write_text(workdir / "bench_reference.md", "\n".join(parts) + "\n")
  print("\n".join(parts))
  return result


def main(argv: Sequence[str]) -> int:
  """Parses the command line and runs; the exit status."""
  try:
    asked = launch.parse(argv, "configs/bench_reference.py")
    jax.config.update("jax_platforms", "cpu")
    run(asked.config, asked.workdir, argv)
  except (ImportError, ValueError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
