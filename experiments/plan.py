"""Plans the memory of a fleet: what fits, and which failures it survives.

  python -m experiments.plan --config=configs/plan.py \
      [--config.model=deepseek-v3 --config.ranks=320 \
       --config.device_memory_gb=80 --config.dtype=bfloat16 \
       --config.context=8192 --config.rows=16 --config.attention=64]

`model` is the name of a preset (`model/presets.py`) or a folder with a
`config.json`, ours or that of a public checkpoint; weights aren't read and
nothing is allocated. GB are 10^9 bytes.

Exit status: 0; 2 where the model doesn't fit or the input is bad (one line on
stderr that says by how many bytes, and what would fit).
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import ml_collections

from experiments import launch
from experiments.plan_failures import Outcome, survey
from experiments.plan_memory import (
  GB,
  Fleet,
  Held,
  check_fits,
  held,
  max_context,
  max_rows,
  room_for_copies,
)
from resilient_moe.model.checkpoint import read_config
from resilient_moe.model.config import ModelConfig
from resilient_moe.model.presets import PRESETS, preset
from resilient_moe.model.sizes import model_size
from resilient_moe.report.table import grid
from third_party import huggingface

CONTEXTS = (1024, 4096, 16_384, 65_536, 131_072)
BAD_INPUT = 2


def model_of(name: str, dtype: str) -> ModelConfig:
  """A preset's config, or that of a checkpoint folder.

  Raises:
    ValueError: neither; lists the presets.
  """
  if name in PRESETS:
    return preset(name, dtype)
  folder = pathlib.Path(name)
  if not (folder / "config.json").is_file():
    raise ValueError(
      f"model={name!r} is neither a folder with a config.json nor a preset; "
      f"presets: {', '.join(PRESETS)}"
    )
  if huggingface.is_checkpoint(folder):
    return huggingface.read_config(folder, dtype)
  return dataclasses.replace(read_config(folder), dtype=dtype)


def fleet_of(config: ml_collections.ConfigDict) -> Fleet:
  """The fleet that a config describes.

  Raises:
    ValueError: a number is out of range.
  """
  for key in ("device_memory_gb", "rows", "context", "chunk", "asked"):
    if config[key] <= 0:
      raise ValueError(f"{key}={config[key]}: more than 0")
  model = model_of(config.model, config.dtype)
  return Fleet(
    name=pathlib.Path(config.model).name,
    config=model,
    size=model_size(model),
    ranks=config.ranks,
    attention=config.attention,
    memory_bytes=int(config.device_memory_gb * GB),
    working_bytes=int(config.working_gb * GB),
    context=config.context,
    rows=config.rows,
    chunk=config.chunk,
    losses=config.losses,
  )


def report(config: ml_collections.ConfigDict) -> str:
  """The whole plan, as Markdown.

  Raises:
    ValueError: the model doesn't fit, or a value is out of range.
  """
  fleet = fleet_of(config)
  check_fits(fleet)
  hosts = config.ranks_per_host, config.hosts_per_rack
  outcomes = survey(fleet, config.axes.to_dict(), hosts, config.asked)
  return "\n".join(
    [
      _title(fleet),
      _memory(fleet),
      _room(fleet),
      _host_memory(fleet, hosts[0]),
      _survival(fleet, outcomes, hosts),
    ]
  )


def gb(value: float) -> str:
  """Bytes as GB."""
  digits = ",.3g" if value < 100 * GB else ",.0f"
  return f"{value / GB:{digits}} GB"


def _title(fleet: Fleet) -> str:
  size, c = fleet.size, fleet.config
  roles = (
    f"{fleet.attention} attention and {fleet.holders} expert ranks"
    if fleet.attention
    else f"{fleet.ranks} ranks that do both"
  )
  return (
    f"# {fleet.name} in {c.dtype} on {roles} of {gb(fleet.memory_bytes)}\n\n"
    f"{size.params / 1e9:.4g} B numbers ({size.active_params / 1e9:.3g} B "
    f"compute a token, its embedding apart); {c.n_experts} experts of "
    f"{gb(size.expert_bytes)} over {c.moe_layers} layers, {c.top_k} a token.\n"
  )


def _memory(fleet: Fleet) -> str:
  """A table of what each kind of rank holds, without and with the reserve."""
  body = []
  names = (("bare", 0), (f"reserve for {fleet.losses} lost", fleet.losses))
  for name, lost in names:
    slots = fleet.slots(lost)
    for kind in held(fleet, slots, fleet.rows):
      body.append([name, *_cells(fleet, kind, slots)])
  header = ["plan", "rank", "dense", "slots", "experts", "KV", "held", "left"]
  return "## A rank's memory\n\n" + grid(header, body, left=(0, 1)) + "\n"


def _cells(fleet: Fleet, kind: Held, slots: int) -> list[str]:
  shown = (kind.dense, kind.experts, kind.kv, kind.total)
  dense, experts, kv, total = map(gb, shown)
  left = fleet.usable_bytes - kind.total
  word = gb(left) if left >= 0 else f"short by {-left:,} B"
  return [
    kind.what, dense, str(slots if kind.experts else 0), experts, kv, total,
    word,
  ]  # fmt: skip


def _room(fleet: Fleet) -> str:
  size, slots = fleet.size, fleet.slots(fleet.losses)
  most, copies = room_for_copies(fleet)
  lines = [
    "## Room\n",
    f"- KV: {size.token_kv_bytes:,} B a token, {gb(fleet.row_bytes())} a row "
    f"of {fleet.context:,} tokens and a chunk of {fleet.chunk}.",
  ]
  if size.token_kv_bytes < size.expanded_token_kv_bytes:
    saved = size.expanded_token_kv_bytes - size.token_kv_bytes
    times = size.expanded_token_kv_bytes / size.token_kv_bytes
    lines.append(
      f"- Latents are cached in place of {size.expanded_token_kv_bytes:,} B of "
      f"keys and values: {saved:,} B a token saved ({times:.1f} times)."
    )
  copied = copies / fleet.config.n_experts
  lines += [
    f"- Slots: {most} at most, so {copies:,} replicas or shadows "
    f"({copied:.2f} an expert) with the reserve for {fleet.losses} lost.",
    f"- Largest context at {fleet.rows} rows: "
    f"{max_context(fleet, slots):,} tokens.",
    "",
  ]
  contexts = [c for c in CONTEXTS if max_rows(fleet, slots, c)]
  rows = [[f"{max_rows(fleet, slots, c):,}" for c in contexts]]
  table = grid([f"{c:,} tokens" for c in contexts], rows, left=())
  return "\n".join(lines) + (
    f"Rows of a rank at most, by context:\n\n{table}" if contexts else ""
  )


def _host_memory(fleet: Fleet, ranks_per_host: int) -> str:
  total = fleet.config.n_experts * fleet.size.expert_bytes
  hosts = -(-fleet.ranks // (ranks_per_host or fleet.ranks))
  return (
    f"\nAll experts once more: {gb(total)}, {gb(total / hosts)} a host if "
    f"{hosts} hosts share them in their memory.\n"
  )


def _survival(
  fleet: Fleet, outcomes: list[Outcome], hosts: tuple[int, int]
) -> str:
  kinds = list(dict.fromkeys(k for o in outcomes for k in o.answers))
  head = ["experts from", "slots", "copies", "rows", "fits"]
  body = [
    [
      o.axis, str(o.slots), str(o.copies), str(o.rows),
      "yes" if not o.short_bytes else f"{o.short_bytes:,} B short",
    ]
    for o in outcomes
  ]  # fmt: skip
  parts = ["## What survives\n", grid(head, body)]
  for kind in kinds:
    parts.append(f"\nLost: {kind}\n")
    rows = [[o.axis, _word(o, kind)] for o in outcomes if kind in o.answers]
    parts.append(grid(["experts from", "service goes on"], rows, left=(0, 1)))
  parts.append(
    f"\nHosts of {hosts[0] or fleet.ranks} ranks, racks of {hosts[1] or 'all'} "
    "hosts. Every policy was asked for a plan on a view of this size, with a "
    "request on each row; shown is the heaviest plan of a kind, or why there "
    "is none. Empty slots take lost experts in; requests without a row wait."
  )
  return "\n".join(parts)


def _word(outcome: Outcome, kind: str) -> str:
  text = outcome.answers[kind].text
  return f"{text} (doesn't fit)" if outcome.short_bytes else text


def main(argv: Sequence[str]) -> int:
  """Parses the command line and prints the plan; the exit status."""
  try:
    asked = launch.parse(argv, "configs/plan.py", workdir=False)
    print(report(asked.config))
  except ValueError as error:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return BAD_INPUT
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
