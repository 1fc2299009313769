"""Every private JAX name of the process runtime, and which sockets are whose.

When the first test fails, a JAX version has moved a name that `private.py`
uses: that module is the one place to change.
"""

import socket
import threading
from collections.abc import Callable, Iterator

import jax
import pytest
from jax._src import clusters, distributed
from jax._src.lib import _jax

from resilient_moe.runtime.process.private import Connections

MODULES = {"_jax": _jax, "clusters": clusters, "distributed": distributed}
NAMES = (
  "_jax.get_distributed_runtime_service",
  "_jax.make_gloo_tcp_collectives",
  "_jax.DistributedRuntimeClient.key_value_delete",
  "clusters.ClusterEnv._cluster_types",
  "clusters.ClusterEnv.is_env_present",
  "clusters.ClusterEnv.get_process_id",
  "distributed.global_state.client",
)
SETTINGS = (
  "jax_num_cpu_devices",
  "jax_enable_recoverability",
  "jax_cpu_collectives_implementation",
  "jax_enable_preemption_service",
  "jax_enable_compilation_cache",
)
WAIT_S = 20.0

A, B, C = (0, 0), (1, 0), (2, 0)
AB, BC = (A, B), (B, C)
Pair = tuple[socket.socket, socket.socket]
Pairs = Callable[[], Pair]


def abort(connections: Connections, gone: object) -> None:
  """Both halves of an abort."""
  connections.forsake(gone)  # type: ignore[arg-type]
  connections.abort()


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_where_it_was(name: str) -> None:
  module, *parts = name.split(".")
  place: object = MODULES[module]
  for part in parts:
    assert hasattr(place, part), (
      f"JAX {jax.__version__} has no {name}, which runtime/process/private.py "
      "needs"
    )
    place = getattr(place, part)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_known(name: str) -> None:
  assert hasattr(jax.config, name), (
    f"JAX {jax.__version__} has no setting {name}, which "
    "runtime/process/private.py needs"
  )


@pytest.fixture
def pairs() -> Iterator[Pairs]:
  made: list[socket.socket] = []

  def pair() -> Pair:
    ends = socket.socketpair()
    made.extend(ends)
    return ends

  yield pair
  for end in made:
    end.close()


def is_shut(end: socket.socket) -> bool:
  """Whether its peer would read an end of file."""
  end.setblocking(False)
  try:
    return end.recv(1) == b""
  except BlockingIOError:
    return False


def test_only_what_appears_while_a_mesh_is_made_is_shut(pairs: Pairs) -> None:
  connections = Connections()
  before = pairs()
  made = connections.made_by(AB, pairs)
  after = pairs()
  assert connections.count() == 2
  abort(connections, [B])
  assert [is_shut(p[0]) for p in (before, made, after)] == [False, True, False]
  assert connections.count() == 0


def test_a_program_that_runs_again_makes_nothing_its_own(pairs: Pairs) -> None:
  connections = Connections()
  connections.made_by(AB, pairs)
  other = connections.made_by(AB, pairs)
  assert connections.count() == 2
  abort(connections, [A])
  assert not is_shut(other[0])


def test_other_meshes_are_left_alone(pairs: Pairs) -> None:
  connections = Connections()
  first = connections.made_by(AB, pairs)
  second = connections.made_by(BC, pairs)
  abort(connections, [A])
  assert is_shut(first[0])
  assert not is_shut(second[0])
  assert connections.made_by(BC, lambda: "runs") == "runs"


def test_numbers_that_are_used_again_are_not_shut_twice(pairs: Pairs) -> None:
  connections = Connections()
  made = connections.made_by(AB, pairs)
  numbers = {end.fileno() for end in made}
  abort(connections, [A])
  for end in made:
    end.close()
  again = pairs()
  assert {end.fileno() for end in again} == numbers
  abort(connections, [B])
  assert not is_shut(again[0])


def test_a_socket_in_the_place_of_another_is_seen(pairs: Pairs) -> None:
  """The number is the same, the socket isn't."""
  connections = Connections()
  closed = pairs()
  numbers = {end.fileno() for end in closed}

  def replace() -> Pair:
    for end in closed:
      end.close()
    return pairs()

  made = connections.made_by(AB, replace)
  assert {end.fileno() for end in made} == numbers
  abort(connections, [A])
  assert is_shut(made[0])


def test_a_mesh_with_somebody_who_is_gone_is_not_tried(pairs: Pairs) -> None:
  connections = Connections()
  made = connections.made_by(BC, pairs)
  abort(connections, [A])
  with pytest.raises(ConnectionAbortedError, match=r"\[\(0, 0\)\] are gone"):
    connections.made_by(AB, lambda: pytest.fail("it would wait for ever"))
  abort(connections, [B])
  assert is_shut(made[0])
  with pytest.raises(ConnectionAbortedError):
    connections.made_by(BC, lambda: pytest.fail("its sockets are shut"))
  replaced = ((1, 1), C)
  assert connections.made_by(replaced, lambda: "runs") == "runs"


def test_an_abort_reaches_connections_that_are_being_made(
  pairs: Pairs,
) -> None:
  connections = Connections()
  made, read = threading.Event(), []

  def run() -> None:
    ours, _ = pairs()
    ours.settimeout(WAIT_S)
    made.set()
    read.append(ours.recv(1))  # a collective whose peer says nothing

  thread = threading.Thread(target=connections.made_by, args=(AB, run))
  thread.start()
  assert made.wait(WAIT_S)
  abort(connections, [C])
  assert read == [], "not one of these members"
  abort(connections, [B])
  thread.join(WAIT_S)
  assert read == [b""]


def test_what_fails_while_it_is_made_is_shut_later(pairs: Pairs) -> None:
  connections = Connections()
  left: list[Pair] = []

  def run() -> None:
    left.append(pairs())
    raise RuntimeError("as a collective does")

  with pytest.raises(RuntimeError, match="as a collective does"):
    connections.made_by(AB, run)
  abort(connections, [A])
  assert is_shut(left[0][0])


def test_an_aborted_making_leaves_no_numbers_behind(pairs: Pairs) -> None:
  connections = Connections()
  left: list[Pair] = []

  def run() -> None:
    left.append(pairs())
    abort(connections, [A])

  connections.made_by(AB, run)
  assert is_shut(left[0][0])
  for end in left[0]:
    end.close()
  again = pairs()
  abort(connections, [B])
  assert not is_shut(again[0])
