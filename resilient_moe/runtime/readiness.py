"""Meshes made ready in peacetime, behind traffic.

Ready means that every program a recovery touches has run once on the mesh.
The compiling is done by a process of low priority, once per mesh size; what
is left for the serving process is to load each mesh's programs (milliseconds)
and to run them once on idle rows, one program between two steps.
"""

import collections
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterable

from resilient_moe.mesh.executables import Executables, write_shape
from resilient_moe.recovery import mesh_named
from resilient_moe.runtime import ahead

COMPILED_POLL_S = 0.005  # between two looks at the store
Name = frozenset[int]
Record = Callable[..., None]  # report.Recorder.write
RunOnce = Callable[[tuple[int, ...], int], None]  # (mesh, chunk width)


class Readiness:
  """The meshes that are still to be made ready."""

  def __init__(
    self,
    executables: Executables,
    folder: pathlib.Path,
    n_devices: int,
    record: Record,
    by_step: bool = False,
  ) -> None:
    """`by_step`: `step` makes a whole mesh ready, however long that takes.

    How many are ready is then a matter of steps, as in a simulation.
    """
    self._by_step = by_step
    self._executables = executables
    self._folder = folder
    self._n_devices = n_devices
    self._record = record
    self._todo: collections.deque[tuple[Name, tuple[int, ...]]] = (
      collections.deque()
    )
    self._left: list[int] = []  # widths of the mesh at hand
    self._seconds = 0.0
    self._compiler: subprocess.Popen | None = None
    self._sizes: set[int] = set()

  def want(self, launched: tuple[int, ...], names: Iterable[Name]) -> None:
    """Adds meshes to make ready; starts compiling for sizes that lack it."""
    for name in names:
      mesh = tuple(int(r) for r in mesh_named(launched, name))
      self._todo.append((name, mesh))
      self._sizes.add(len(mesh))
    self._start_compiler()

  def wants(self, name: Name) -> bool:
    """Whether a mesh is on its way to be ready."""
    return any(n == name for n, _ in self._todo)

  def wait_compiled(self, size: int) -> None:
    """Blocks until the programs of a mesh size are in the store."""
    self._sizes.add(size)
    while not self._compiled(size):
      self.check_compiler("now")
      time.sleep(COMPILED_POLL_S)

  def drop_rank(self, rank: int) -> None:
    """Meshes with a lost rank will never be needed."""
    kept = [(n, m) for n, m in self._todo if rank not in m]
    self._todo, self._left = collections.deque(kept), []

  @property
  def done(self) -> bool:
    return not self._todo

  @property
  def working(self) -> bool:
    """Whether `step` has something to run at once."""
    return bool(self._todo) and self._compiled(len(self._todo[0][1]))

  def compile(self, sizes: Iterable[int]) -> None:
    """Compiles at once, for a start that waits: these sizes, largest first."""
    self._sizes.update(sizes)
    self._start_compiler("now", self._executables.has_rank_programs())

  def _start_compiler(self, when: str = "idle", complete: bool = True) -> None:
    if self._compiler is not None and self._compiler.poll() is None:
      return
    sizes = [s for s in sorted(self._sizes) if not self._compiled(s)]
    if sizes or not complete:
      write_shape(self._executables.shape, self._folder / ahead.SHAPE_FILE)
      self._compiler = ahead.start(
        self._folder, self._n_devices, sizes[::-1], when
      )

  def _compiled(self, size: int) -> bool:
    chunks = self._executables.shape.chunks()
    return all(self._executables.available(c, size) for c in chunks)

  def step(self, run_once: RunOnce) -> Name | None:
    """One program of one mesh, if it is compiled; else nothing.

    Returns the mesh that this made ready, if it was its last program.
    """
    if not self._todo:
      return None
    name, mesh = self._todo[0]
    if not self._left:
      if self._by_step:
        self.wait_compiled(len(mesh))
      elif not self._compiled(len(mesh)):
        self.check_compiler()
        return None
      self._left = list(self._executables.shape.chunks())
    start = time.monotonic()
    run_once(mesh, self._left.pop())
    while self._by_step and self._left:
      run_once(mesh, self._left.pop())
    self._seconds += time.monotonic() - start
    if self._left:
      return None
    self._todo.popleft()
    self._record("mesh_ready", absent=sorted(name), seconds=self._seconds)
    self._seconds = 0.0
    return name

  def check_compiler(self, when: str = "idle") -> None:
    """A compiler that died leaves nothing to wait for: say so."""
    if self._compiler is None:
      self._start_compiler(when)
    elif code := self._compiler.poll():
      raise RuntimeError(f"compiling ahead of time failed with status {code}")
    elif code == 0:
      self._start_compiler(when)

  def close(self) -> None:
    """Ends the compiler process."""
    if self._compiler is not None:
      self._compiler.kill()
      self._compiler.wait()
