"""Compiled programs of attention and expert ranks, kept for all tests."""

import dataclasses
import hashlib
import pathlib

import jax

from resilient_moe.mesh.executables import Executables, LowerPrograms
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.mesh.split_programs import (
  buckets,
  lower_attention_programs,
  lower_expert_programs,
)


def link_families(
  root: pathlib.Path, shape: InstanceShape, folder: pathlib.Path
) -> None:
  """Both families into an instance's store, compiled once for like shapes."""
  any_rows = dataclasses.replace(shape.options, rows=1)
  about: dict[LowerPrograms, tuple] = {
    lower_attention_programs: (shape.config, shape.options),
    lower_expert_programs: (
      shape.config, any_rows, buckets(shape), shape.slots
    ),
  }  # fmt: skip
  for family, what in about.items():
    key = hashlib.sha1(repr((family.__name__, what)).encode())
    shared = root / "families" / key.hexdigest()[:12]
    shared.mkdir(parents=True, exist_ok=True)
    executables = Executables(shape, shared)
    for name in family(shape, jax.devices()[0]):
      executables.compile_family(family, name, jax.devices()[0])
      if not (folder / name).exists():
        (folder / name).symlink_to(shared / name)
