"""What a training run leaves in its work directory.

run.json        config, command, versions, fingerprint of the text
metrics.jsonl   one line every few steps
checkpoints/    orbax, the last two
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import ml_collections
import orbax.checkpoint as ocp

from experiments import train_card
from experiments.corpus import Corpus

Tree = TypeVar("Tree")


def claim_workdir(
  config: ml_collections.ConfigDict,
  text: Corpus,
  workdir: pathlib.Path,
  check: Callable[[ml_collections.ConfigDict, dict[str, Any], int], None],
) -> None:
  """Records what is run; refuses the directory of another run.

  `check(config, old config, steps done)` says whether a run may go on.
  """
  record = {
    "command": train_card.command_line(sys.argv),
    "config": json.loads(config.to_json()),
    "corpus_sha1": text.sha1,
    "versions": train_card.versions(),
  }
  file = workdir / "run.json"
  if file.is_file():
    found = json.loads(file.read_text())
    if found["corpus_sha1"] != text.sha1:
      raise ValueError(
        f"{workdir}: the run there read other text (another Python?): choose "
        "a new --workdir"
      )
    with open_checkpoints(workdir, read_only=True) as checkpoints:
      check(config, found["config"], checkpoints.latest_step() or 0)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
  except OSError as e:
    raise ValueError(f"--workdir={workdir} can't be written: {e}") from e


def open_checkpoints(
  workdir: pathlib.Path, read_only: bool = False
) -> ocp.CheckpointManager:
  """The run's checkpoints; the last two are kept, for a reader of the last."""
  options = ocp.CheckpointManagerOptions(
    max_to_keep=None if read_only else 2,
    read_only=read_only,
    create=not read_only,
    enable_async_checkpointing=False,
  )
  return ocp.CheckpointManager(
    (workdir / "checkpoints").absolute(), options=options
  )


def restore(checkpoints: ocp.CheckpointManager, state: Tree) -> Tree:
  """The last checkpoint, or `state` where there is none."""
  last = checkpoints.latest_step()
  if last is None:
    return state
  like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  return checkpoints.restore(last, args=ocp.args.StandardRestore(like))


class MetricsLog:
  """`metrics.jsonl` and the progress line."""

  def __init__(self, workdir: pathlib.Path, start: int, total: int):
    self._file = workdir / "metrics.jsonl"
    self._total = total
    # What was logged past the checkpoint is about to be done again.
    kept = [m for m in read_metrics(self._file) if m["step"] <= start]
    self._file.write_text("".join(json.dumps(m) + "\n" for m in kept))
    last = kept[-1] if kept else {"step": start, "elapsed_s": 0.0}
    self._done, self._elapsed_s = int(last["step"]), float(last["elapsed_s"])
    self._tokens, self._since = 0, time.perf_counter()

  def count(self, tokens: int) -> None:
    self._tokens += tokens

  def write(
    self, step: int, metrics: dict[str, jax.Array], held_out: float | None
  ) -> None:
    """Adds a line; waits for the step it is about."""
    values = {k: round(float(v), 6) for k, v in metrics.items()}
    if held_out is not None:
      values["held_out_bits_per_byte"] = round(held_out, 6)
    now = time.perf_counter()
    seconds, self._since = now - self._since, now
    self._elapsed_s += seconds
    rate, self._tokens = self._tokens / seconds, 0
    per_step = seconds / max(step - self._done, 1)
    self._done = step
    line = {"step": step, **values, "tokens_per_s": round(rate),
            "elapsed_s": round(self._elapsed_s, 1)}  # fmt: skip
    with self._file.open("a") as f:
      f.write(json.dumps(line) + "\n")
    held = f"  held out {held_out:.3f}" if held_out is not None else ""
    eta = per_step * (self._total - step) / 60
    print(
      f"step {step}/{self._total}  {values['bits_per_byte']:.3f} bits/byte"
      f"{held}  {rate:,.0f} tokens/s  ETA {eta:.1f} min",
      flush=True,
    )


def read_metrics(file: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a metrics file; none where there is no file."""
  if not file.is_file():
    return []
  return [json.loads(line) for line in file.read_text().splitlines()]
