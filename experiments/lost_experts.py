"""What losing experts costs in quality, after ReviveMoE's accuracy table.

  python -m experiments.lost_experts --config=configs/lost_experts.py \
      --workdir=DIR [--config.checkpoint=FOLDER] \
      [--config.texts=a.txt,b.txt] [--config.fractions=0,1/8,1/2]

For each domain, which experts are lost is measured (the most used ones of this
very text: the worst case) or spaced evenly; the same ones go in every layer,
as a rank holds the same experts of all layers. `how` says what is done:
`masked` (the gate takes the next best: what `MaskExperts` does when serving),
`dropped` (they add nothing), `nearest` (the live expert with the nearest
weights answers). A finished cell is skipped when asked again.

DIR then holds table.md, table.csv, table.tex, lost_experts.png and .pdf,
config.json, provenance.json, and cells/ with every window's sums.

Exit status: 0; 2 for bad input (one line on stderr, nothing written).
"""

import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from experiments import launch
from experiments import lost_experts_report as report
from experiments import lost_experts_score as scoring
from experiments import lost_experts_texts as texts
from experiments.cases import ASSETS
from experiments.lost_experts_score import Loss, Score, interval
from experiments.provenance import provenance
from resilient_moe.model import load_checkpoint
from resilient_moe.model.config import ModelConfig
from resilient_moe.report.runs import write_text
from third_party import huggingface

BAD_INPUT = 2


class Model(NamedTuple):
  """What is scored."""

  config: ModelConfig
  params: Any
  tokenizer: texts.Tokenizer
  by_token: bool  # a token is not a byte


class Cell(NamedTuple):
  """A domain with some experts gone."""

  windows: texts.Windows
  load: np.ndarray  # [L_moe, E]
  loss: Loss
  fraction: str


def listed(config: ml_collections.ConfigDict, key: str) -> list[str]:
  """The parts of "a,b"; "" has none."""
  return [part.strip() for part in config[key].split(",") if part.strip()]


def chosen(
  config: ml_collections.ConfigDict, key: str, choices: Sequence[str]
) -> list[str]:
  """The parts of "a,b", each of them one of the choices.

  Raises:
    ValueError: another one, or none.
  """
  found = listed(config, key)
  wrong = [part for part in found if part not in choices]
  if wrong or not found:
    raise ValueError(
      f"{key}={config[key]!r}: choose from {', '.join(choices)}"
    )
  return found


def load_model(name: str, dtype: str) -> Model:
  """A shipped model, a folder of ours, or a published checkpoint.

  Raises:
    ValueError: none of them.
  """
  folder = ASSETS / name if (ASSETS / name).is_dir() else pathlib.Path(name)
  if huggingface.is_checkpoint(folder):
    tokenizer = texts.FileTokenizer(folder)
    config, params = huggingface.load_huggingface(folder, dtype)
    return Model(config, params, tokenizer, True)
  config, params = load_checkpoint(folder)
  if config.vocab_size != texts.BYTES:
    raise ValueError(
      f"checkpoint={name!r}: vocab_size={config.vocab_size}; without a "
      f"tokenizer.json a token is a byte and there are {texts.BYTES}"
    )
  return Model(config, params, texts.ByteTokenizer(), False)


def cut_domains(
  config: ml_collections.ConfigDict, tokenizer: texts.Tokenizer
) -> list[texts.Windows]:
  """The windows of every domain that a config asks for."""
  for key in ("context", "windows", "batch"):
    if config[key] < 1:
      raise ValueError(f"{key}={config[key]}: at least 1")
  if not 0 <= config.warmup < config.context:
    raise ValueError(
      f"warmup={config.warmup}: 0 to {config.context - 1}, below context"
    )
  files = listed(config, "texts")
  names = [] if files else chosen(config, "domains", texts.OWN)
  return [
    texts.cut(
      name, documents, tokenizer, config.context, config.warmup,
      config.windows,
    )
    for name, documents in texts.domains(files, names).items()
  ]  # fmt: skip


def cells_of(
  config: ml_collections.ConfigDict,
  model: Model,
  domains: Sequence[texts.Windows],
  losses: Sequence[tuple[Loss, str]],
) -> Iterator[Cell]:
  """Every cell, domain by domain."""
  for windows in domains:
    load = scoring.load_of(model.config, model.params, windows, config.batch)
    for loss, fraction in losses:
      yield Cell(windows, load, loss, fraction)


def losses_of(
  config: ml_collections.ConfigDict, model: ModelConfig
) -> list[tuple[Loss, str]]:
  """What is lost, and which fraction that is; the least first.

  Raises:
    ValueError: a choice or a fraction is wrong.
  """
  amounts = scoring.counts(listed(config, "fractions"), model)
  which = chosen(config, "which", scoring.WHICH)
  how = chosen(config, "how", scoring.HOW)
  found = []
  for count, fraction in sorted(amounts.items()):
    ways = [Loss(count, w, h) for w in which for h in how]
    found += [(loss, fraction) for loss in (ways if count else [Loss(0)])]
  return found


def digest(config: ml_collections.ConfigDict, domains: Any) -> str:
  """What cells of one work directory must have in common."""
  keys = ("checkpoint", "dtype", "context", "warmup")
  found = hashlib.sha256(json.dumps([config[k] for k in keys]).encode())
  for windows in domains:
    found.update(windows.name.encode() + windows.tokens.tobytes())
  return found.hexdigest()[:16]


def run(
  config: ml_collections.ConfigDict,
  workdir: pathlib.Path,
  argv: Sequence[str] = ("lost_experts",),
) -> list[report.Row]:
  """Scores every cell that isn't there yet; writes and prints the table.

  Raises:
    ValueError: before anything is written.
  """
  model = load_model(config.checkpoint, config.dtype)
  domains = cut_domains(config, model.tokenizer)
  losses = losses_of(config, model.config)
  mark = digest(config, domains)
  _claim(workdir, mark)
  start = time.monotonic()
  rows, whole = [], {}
  cells = list(cells_of(config, model, domains, losses))
  for number, cell in enumerate(cells, 1):
    found, fresh = _scored(workdir, config, model, cell)
    name = cell.windows.name
    if not cell.loss.count:
      whole[name] = found
    row = _row(cell, found, whole.get(name, found), config.seed)
    rows.append(row)
    _tell(number, len(cells), row, fresh, time.monotonic() - start)
  origin = provenance("experiments.lost_experts", argv, "single", 1)
  write_text(workdir / "provenance.json", json.dumps(origin, indent=2) + "\n")
  names = report.write(workdir, rows, model.by_token, _notes(config, domains))
  print(f"\n{(workdir / 'table.md').read_text('utf-8')}")
  print(f"In {workdir}: {', '.join(names)}; cells/ has every window's sums")
  return rows


def _claim(workdir: pathlib.Path, mark: str) -> None:
  """Makes the work directory this comparison's, or says whose it is."""
  file = workdir / "config.json"
  if file.is_file() and json.loads(file.read_text("utf-8"))["digest"] != mark:
    raise ValueError(
      f"--workdir={workdir} holds scores of another checkpoint or other "
      "windows; choose a new one"
    )
  (workdir / "cells").mkdir(parents=True, exist_ok=True)
  write_text(file, json.dumps({"digest": mark}) + "\n")


def _scored(
  workdir: pathlib.Path,
  config: ml_collections.ConfigDict,
  model: Model,
  cell: Cell,
) -> tuple[Score, bool]:
  """A cell's sums, from its file if there is one; whether they are new."""
  file = workdir / "cells" / f"{cell.windows.name}-{cell.loss.name}.json"
  if file.is_file():
    kept = json.loads(file.read_text("utf-8"))
    return Score(**{k: np.array(v) for k, v in kept.items()}), False
  found = scoring.score(
    model.config, model.params, cell.windows, cell.loss, cell.load,
    config.batch,
  )  # fmt: skip
  values = {k: v.tolist() for k, v in vars(found).items()}
  write_text(file, json.dumps(values))
  return found, True


def _row(cell: Cell, found: Score, whole: Score, seed: int) -> report.Row:
  """A cell's statistics; changes are of the same windows."""
  stat = lambda above, below: interval(
    above, below, cell.windows.document, seed
  )
  return report.Row(
    domain=cell.windows.name,
    lost=cell.fraction,
    share=cell.loss.count / cell.load.shape[1],
    which=cell.loss.which,
    how=cell.loss.how,
    bits=stat(found.bits, found.bytes),
    token_bits=stat(found.bits, found.tokens),
    accuracy=stat(found.right, found.tokens),
    more_bits=stat(found.bits - whole.bits, found.bytes),
    less_accuracy=stat(found.right - whole.right, found.tokens),
  )


def _tell(
  number: int, total: int, row: report.Row, fresh: bool, spent_s: float
) -> None:
  what = f"{row.lost} {row.which} {row.how}" if row.which else "nothing"
  left = spent_s / number * (total - number)
  when = f"about {left:.0f} s left" if fresh else "done before"
  print(
    f"[{number}/{total}] {row.domain}, {what} lost: {row.bits[0]:.3f} bits per "
    f"byte; {when}",
    flush=True,
  )


def _notes(
  config: ml_collections.ConfigDict, domains: Sequence[texts.Windows]
) -> str:
  sizes = ", ".join(
    f"{w.name} {len(w.tokens)} windows of {len(np.unique(w.document))} "
    f"documents, {int((w.sizes * w.scored).sum()):,} bytes scored"
    for w in domains
  )
  return (
    "\nValue [95% bootstrap interval over documents]; changes are of the same "
    "windows, against the whole model. The same experts are lost in every "
    "layer; most used: by this very text, all layers together. "
    f"Windows of {config.context} tokens, the first {config.warmup} of each "
    f"not scored: {sizes}."
  )


def main(argv: Sequence[str]) -> int:
  """Parses the command line and runs; the exit status."""
  try:
    asked = launch.parse(argv, "configs/lost_experts.py")
    jax.config.update("jax_platforms", "cpu")
    run(asked.config, asked.workdir, argv)
  except (ImportError, ValueError) as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
