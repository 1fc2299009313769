"""The card of a trained model: README.md, card.json, loss_curve.png."""

import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
from typing import Any

import jax
import numpy as np

from experiments import ngram
from experiments.corpus import Corpus
from experiments.train_eval import evaluate, sample
from resilient_moe.model import ModelConfig
from resilient_moe.report import style

_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")
_PROMPTS = (b"\0The ", b'\0class Queue(Base):\n    """')

_README = """\
# byte_moe: the trained model that ships with resilient_moe

A byte-level mixture-of-experts decoder, {parameters:,} parameters, trained on
text that every Python carries: `pydoc_data.topics` and the docstrings of the
standard library ({train_bytes:,} bytes, {held_out_bytes:,} more held out, one
document in ten by the sha1 of its name). A token is a byte; byte 0 begins a
document, and every prompt should begin with it.

Its purpose is to be served and broken: its text is good enough to see that a
sentence goes on unchanged after a fault. It knows nothing else.

| held-out text | bits per byte |
|---|---|
| this model (bfloat16 weights, context {context}) | **{bits:.3f}** |
| interpolated Kneser-Ney, {ngram_context} bytes of context | {ngram_bits:.3f} |
| uniform | 8.000 |

Both were trained on the same bytes and scored on the same bytes by the same
command; the order of the Kneser-Ney model is the best of 4 to 8 on the
held-out text itself.

## Training
```
{command}
```
{steps:,} of {total_steps:,} steps, {tokens:,} bytes read ({epochs:.1f} passes
over the training text), {minutes:.0f} minutes on {cpus} cores shared with
other work. Python {python}; {packages}. Seed and config are in `card.json`;
another Python carries other text (corpus sha1 `{sha1}`).

![loss curve](loss_curve.png)

The held-out slice is scored at context {context} throughout. Contexts grow
during the run ({contexts} bytes), and the model can't use positions that it
has not been trained on: hence the fall of the curve at the last change.

## Load per expert
Fraction of assignments on the held-out text (even would be {even:.3f}), and
the entropy of the load as a fraction of its maximum.

{load_table}

## Samples
Temperature 0.7, prompt first, as generated.

{samples}
"""


def write(
  folder: pathlib.Path,
  model: ModelConfig,
  params: Any,
  text: Corpus,
  record: dict[str, Any],
  step: int,
  metrics: list[dict[str, float]],
) -> dict[str, Any]:
  """Scores the model and writes its card; returns what card.json holds."""
  config = record["config"]
  scored = evaluate(model, params, text.held_out, config["eval_context"])
  order, ngram_bits = ngram.best(text.train, text.held_out)
  card = {
    **record,
    "steps": step,
    "total_steps": sum(phase[0] for phase in config["phases"]),
    "tokens": _tokens_read(config["phases"], step),
    "minutes": round(metrics[-1]["elapsed_s"] / 60, 1) if metrics else 0.0,
    "parameters": _parameters(params),
    "train_bytes": len(text.train),
    "held_out_bytes": len(text.held_out),
    "held_out_bits_per_byte": round(scored.bits_per_byte, 4),
    "slice_bytes": config["eval_bytes"],
    "slice_bits_per_byte": round(
      float(scored.bits[: config["eval_bytes"]].mean()), 4
    ),
    "ngram_context": order,
    "ngram_bits_per_byte": round(ngram_bits, 4),
    "load": np.round(scored.load, 4).tolist(),
    "load_entropy": np.round(scored.load_entropy, 4).tolist(),
    "samples": [
      _show(sample(model, params, prompt, config["sample_bytes"], seed))
      for seed, prompt in enumerate(_PROMPTS)
    ],
  }
  (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
  plot(folder / "loss_curve.png", metrics, ngram_bits)
  (folder / "README.md").write_text(readme(card))
  return card


def readme(card: dict[str, Any]) -> str:
  """The card in words."""
  versions = dict(card["versions"])
  return _README.format(
    **{
      k: card[k]
      for k in (
        "parameters",
        "train_bytes",
        "held_out_bytes",
        "ngram_context",
        "command",
        "steps",
        "total_steps",
        "tokens",
        "minutes",
      )
    },
    bits=card["held_out_bits_per_byte"],
    ngram_bits=card["ngram_bits_per_byte"],
    context=card["config"]["eval_context"],
    contexts=", ".join(str(phase[2]) for phase in card["config"]["phases"]),
    epochs=card["tokens"] / card["train_bytes"],
    cpus=versions.pop("cpus"),
    python=versions.pop("python"),
    packages=", ".join(f"{k} {v}" for k, v in versions.items()),
    sha1=card["corpus_sha1"],
    even=1 / len(card["load"][0]),
    load_table=_load_table(card),
    samples="\n\n".join(f"```text\n{s}\n```" for s in card["samples"]),
  )


def summary(card: dict[str, Any]) -> str:
  """One line for the end of a run."""
  return (
    f"held out: {card['held_out_bits_per_byte']:.3f} bits/byte, n-gram "
    f"{card['ngram_bits_per_byte']:.3f}; least load entropy "
    f"{min(card['load_entropy']):.3f}; {card['minutes']} min"
  )


def plot(
  file: pathlib.Path, metrics: list[dict[str, float]], ngram_bits: float
) -> None:
  """Training and held-out loss over the steps, and the n-gram's line."""
  with style.context():
    figure = style.figure(style.PAGE_IN, 3.4)
    axes = figure.subplots()
    held = [m for m in metrics if "held_out_bits_per_byte" in m]
    axes.plot(
      [m["step"] for m in metrics],
      [m["bits_per_byte"] for m in metrics],
      lw=0.6,
      color=style.GREY,
      label="training batch",
    )
    axes.plot(
      [m["step"] for m in held],
      [m["held_out_bits_per_byte"] for m in held],
      lw=1.6,
      color=style.BLUE,
      label="held-out slice",
    )
    axes.axhline(
      ngram_bits, ls="--", lw=1, color=style.VERMILION,
      label="Kneser-Ney, all held-out text",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1, 5.5))
    axes.legend()
    figure.savefig(file, dpi=110)


def command_line(argv: list[str]) -> str:
  """The command to type for a process started as `python -m`."""
  return shlex.join(["python", "-m", "experiments.train", *argv[1:]])


def versions() -> dict[str, Any]:
  """What the numbers depend on besides the seed."""
  return {
    "python": platform.python_version(),
    "cpus": os.cpu_count(),
    **{name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def _tokens_read(phases: list[list[int]], step: int) -> int:
  total = 0
  for steps, sequences, context in phases:
    total += min(steps, step) * sequences * context
    step -= min(steps, step)
  return total


def _parameters(params: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


def _load_table(card: dict[str, Any]) -> str:
  """A Markdown row per layer."""
  experts = range(len(card["load"][0]))
  lines = [
    "| layer | " + " | ".join(map(str, experts)) + " | entropy |",
    "|---" * (len(experts) + 2) + "|",
  ]
  for i, row in enumerate(card["load"]):
    cells = " | ".join(f"{x:.3f}" for x in row)
    lines.append(f"| {i} | {cells} | {card['load_entropy'][i]:.3f} |")
  return "\n".join(lines)


def _show(text: bytes) -> str:
  return text.replace(b"\0", b"").decode("utf-8", "replace")
