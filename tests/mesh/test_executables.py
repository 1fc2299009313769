"""Warm, stored or compiled; one compilation a mesh size."""

import contextlib
import pathlib

import jax
import numpy as np
import pytest

from resilient_moe.mesh import Executables, Source
from resilient_moe.mesh.executables import read_shape, write_shape
from resilient_moe.runtime import ahead
from tests.mesh import shapes

COMPILES = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
  """Names of the programs that JAX compiles meanwhile."""
  names: list[str] = []

  def listen(event: str, _: float, **facts):
    if event == COMPILES:
      names.append(str(facts.get("fun_name")))

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
  """A store with the decode step of three ranks and one rank's programs."""
  folder = tmp_path_factory.mktemp("store") / "run"
  executables = Executables(shapes.instance(), folder)
  with compilations() as names:
    sources = [executables.step(0, shapes.devices(0, 1, 2))[1]]
    executables.rank_programs(jax.devices()[0])
    first = list(names)
    sources.append(executables.step(0, shapes.devices(0, 1, 2))[1])
    sources.append(executables.step(0, shapes.devices(4, 6, 1))[1])
    executables.rank_programs(jax.devices()[5])
    later = names[len(first) :]
  return folder, executables, sources, first, later


def test_one_compilation_serves_every_set_of_that_size(filled):
  _, _, sources, first, later = filled
  assert sources == [Source.COMPILED, Source.WARM, Source.STORED]
  assert sum("step_3_ranks" in name for name in first) == 1
  assert not later


def test_relocated_step_gives_equal_results(filled):
  _, executables, *_ = filled
  results = []
  for ids in ((0, 1, 2), (4, 6, 1), (8, 7, 6)):
    on = shapes.devices(*ids)
    program, _ = executables.step(0, on)
    results.append(shapes.run(program, executables.shape, on, 0))
  for other in results[1:]:
    for a, b in zip(results[0], other, strict=True):
      np.testing.assert_array_equal(a, b)


def test_another_engine_over_the_store_compiles_nothing(filled):
  folder, executables, *_ = filled
  fresh = Executables(shapes.instance(), folder)
  assert fresh.available(0, 3)
  assert not fresh.available(8, 3)
  assert not fresh.available(0, 4)
  with compilations() as names:
    program, source = fresh.step(0, shapes.devices(3, 2, 5))
    fresh.rank_programs(jax.devices()[2])
    fresh.compile_for(0, shapes.devices(0, 1, 2))  # is there already
  assert source == Source.STORED
  assert not names
  on = shapes.devices(3, 2, 5)
  mine = shapes.run(program, fresh.shape, on, 0)
  first = shapes.devices(0, 1, 2)
  want = shapes.run(executables.step(0, first)[0], fresh.shape, first, 0)
  for a, b in zip(mine, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_store_holds_whole_files_and_no_others(filled):
  folder, *_ = filled
  names = {f.name for f in folder.iterdir()}
  assert names == {"step0x3", "commit0", "commit8", "write_slot"}


def test_write_that_is_cut_off_is_no_file(filled, tmp_path, monkeypatch):
  """The bytes appear under the name only when all of them are there."""
  folder, *_ = filled
  portable = Executables(shapes.instance(), folder)._find("commit0")
  monkeypatch.setattr(
    "resilient_moe.mesh.relocate.serialize", lambda *a: portable
  )

  def full_disk(self, data):
    with open(self, "wb") as file:
      file.write(data[:10])
    raise OSError("no space left")

  monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
  broken = Executables(shapes.instance(), tmp_path)
  with pytest.raises(OSError, match="no space left"):
    broken._keep("commit0", None, jax.devices()[:1])
  monkeypatch.undo()
  assert not (tmp_path / "commit0").exists()
  assert Executables(shapes.instance(), tmp_path)._find("commit0") is None


def test_shape_travels_to_the_compiler_process(tmp_path):
  shape = shapes.instance(dispatch="all_gather", rows=5)
  write_shape(shape, tmp_path / "shape.json")
  assert read_shape(tmp_path / "shape.json") == shape


def test_process_that_compiles_ahead_fills_the_store(tmp_path):
  shape = shapes.instance()
  write_shape(shape, tmp_path / ahead.SHAPE_FILE)
  process = ahead.start(tmp_path, n_devices=3, sizes=[2])
  assert process.wait(timeout=300) == 0
  fresh = Executables(shape, tmp_path)
  with compilations() as names:
    for chunk in shape.chunks():
      program, source = fresh.step(chunk, shapes.devices(6, 1))
      assert source == Source.STORED
  assert not names
  shapes.run(program, shape, shapes.devices(6, 1), shape.options.chunk)
