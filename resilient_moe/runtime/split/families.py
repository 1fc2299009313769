"""The programs of each role, and how they come to be."""

import concurrent.futures
from typing import Any

import jax

from resilient_moe.mesh.executables import Executables
from resilient_moe.mesh.split_programs import (
  lower_attention_programs,
  lower_expert_programs,
)
from resilient_moe.recovery import Role

FAMILIES = (lower_attention_programs, lower_expert_programs)


def programs_of(
  executables: Executables, role: Role, device: jax.Device
) -> dict[str, Any]:
  """A role's programs on a device, by name."""
  attends = role == Role.ATTENTION
  return executables.programs(FAMILIES[0 if attends else 1], device)


def compile_families(executables: Executables, device: jax.Device) -> None:
  """Every program of both kinds of ranks is in the store, once for all."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    jobs = [
      pool.submit(executables.compile_family, family, name, device)
      for family in FAMILIES
      for name in family(executables.shape, device)
    ]
    for job in jobs:
      job.result()
