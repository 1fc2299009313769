"""Every program lowers for accelerators from a machine without one."""

import jax
import numpy as np
import pytest

from resilient_moe.mesh import programs, split_programs
from resilient_moe.model.config import DISPATCHES
from tests.mesh import shapes

PLATFORMS = ["cuda", "tpu"]
CHUNKS = (0, shapes.OPTIONS.chunk)
COLLECTIVE = {d: f"stablehlo.{d}" for d in DISPATCHES}


def check(exported: jax.export.Exported) -> str:
  assert list(exported.platforms) == PLATFORMS
  text = exported.mlir_module()
  assert "callback" not in text
  return text


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_step_lowers_for_accelerators(dispatch, chunk):
  shape = shapes.instance(dispatch=dispatch)
  fn, arguments = shapes.step(shape, shapes.abstract_mesh(8), chunk)
  exported = jax.export.export(fn, platforms=PLATFORMS)(*arguments)
  assert exported.nr_devices == 8
  assert COLLECTIVE[dispatch] in check(exported)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_logical_step_lowers_for_one_accelerator(dispatch):
  shape = shapes.instance(dispatch=dispatch)
  fn = jax.jit(programs.logical_step(shape, 8))
  arguments = programs.step_shapes(shape, 8, shape.options.chunk)
  exported = jax.export.export(fn, platforms=PLATFORMS)(*arguments)
  assert exported.nr_devices == 1
  text = check(exported)
  assert not any(name in text for name in COLLECTIVE.values())


FAMILIES = {
  programs.lower_rank_programs: {"commit0", "commit8", "write_slot"},
  split_programs.lower_attention_programs: {
    f"{name}{chunk}"
    for name in ("begin", "go_on", "finish", "commit")
    for chunk in (0, 8)
  },
  split_programs.lower_expert_programs: {
    "experts16", "experts64", "write_slot",
  },
}  # fmt: skip


@pytest.mark.parametrize("lower", FAMILIES)
def test_one_device_s_programs_lower_for_accelerators(lower, monkeypatch):
  """Through the function that lists them, so that a new program is found."""

  class Exporting:
    def __init__(self, jitted):
      self.jitted = jitted

    def lower(self, *arguments):
      plain = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), arguments
      )
      return jax.export.export(self.jitted, platforms=PLATFORMS)(*plain)

  jit = jax.jit
  monkeypatch.setattr(jax, "jit", lambda *a, **k: Exporting(jit(*a, **k)))
  exported = lower(shapes.instance(), jax.devices()[0])
  assert set(exported) == FAMILIES[lower]
  made = [each() for each in exported.values()]
  monkeypatch.undo()
  for each in made:
    text = check(each)
    assert not any(name in text for name in COLLECTIVE.values())


def test_ten_thousand_ranks_lower_in_the_work_of_eight():
  sizes = {}
  for n in (8, 10_240):
    fn, arguments = shapes.step(shapes.instance(), shapes.abstract_mesh(n), 0)
    lowered = fn.trace(*arguments).lower(lowering_platforms=("tpu",))
    sizes[n] = lowered.as_text().count("\n")  # one operation a line
  assert sizes[10_240] < 1.1 * sizes[8]


def test_lowered_step_is_the_exported_one():
  """`lower_step` is what the tests above took apart."""
  shape = shapes.instance()
  fn, arguments = shapes.step(
    shape, programs.make_mesh(shapes.devices(0, 1, 2)), 0
  )
  ours = fn.lower(*arguments).as_text()
  theirs = programs.lower_step(shape, shapes.devices(0, 1, 2), 0).as_text()
  name = lambda text: text.split("@", 1)[1].split(None, 1)[0]
  assert ours.replace(name(ours), "") == theirs.replace(name(theirs), "")


def test_step_has_no_operation_for_recovery():
  """Policies differ in arguments only: equal shapes, equal programs."""
  shape = shapes.instance()
  texts = {
    programs.lower_step(shape, shapes.devices(*ids), 0).as_text()
    for ids in ((0, 1, 2), (0, 1, 2), (4, 7, 2))
  }
  assert len(texts) == 1
  fields = {f.name for f in shape.__dataclass_fields__.values()}
  assert fields == {"config", "options", "slots", "copies"}


def test_write_slot_writes_one_slot(rng):
  shape = shapes.instance(slots=3)
  stacks = {
    name: rng.standard_normal(s.shape).astype(np.float32)
    for name, s in programs.expert_shapes(shape, 1).items()
  }
  new = {n: rng.standard_normal((2, *x.shape[3:])) for n, x in stacks.items()}
  new = {n: x.astype(np.float32) for n, x in new.items()}
  got = jax.jit(programs.write_slot)(stacks, new, np.int32(1))
  for name, x in got.items():
    np.testing.assert_array_equal(x[:, 0, 1], new[name])
    np.testing.assert_array_equal(x[:, 0, ::2], stacks[name][:, 0, ::2])
