"""Several stores: who streams where, and what a dead one leaves."""

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from resilient_moe.runtime.process import kv_store
from resilient_moe.runtime.process.data import DataClient
from resilient_moe.runtime.process.stores import Stores
from resilient_moe.runtime.process.stream import KVStream

KEY = b"key of a test"
L, K2, D = 2, 2, 8
SHAPE = (L, K2, 32, D)
WAIT_S = 30.0


@pytest.fixture
def stores() -> Iterator[Stores]:
  made = Stores(3, SHAPE, "float32", KEY)
  yield made
  made.close()
  assert made.alive() == ()


def strike(stores: Stores, i: int) -> None:
  """As a fault from outside, of which nobody is told."""
  pid = stores.pids[i]
  os.kill(pid, signal.SIGKILL)
  os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def log_step(stream: KVStream, step: int, data: np.ndarray, name: str) -> None:
  """A step of one position, which is its id."""
  for layer in range(L):
    stream.log(step, layer, data[layer])
  stream.commit(step, [(name, 0, step, 1)])


def test_every_rank_has_a_store_and_all_are_used(stores):
  addresses = stores.addresses()
  assert sorted(addresses) == [0, 1, 2] == list(stores.alive())
  assert len(set(addresses.values())) == len(set(stores.pids.values())) == 3
  for rank in range(7):
    assert stores.address_for(rank) == addresses[rank % 3]
  assert stores.ranks_of(1) == (1, 4)
  assert stores.lost() == ()


def test_a_lost_store_is_noticed_once(stores):
  strike(stores, 1)
  assert stores.lost() == (1,)
  assert stores.lost() == ()
  assert stores.alive() == (0, 2)
  assert sorted(stores.addresses()) == sorted(stores.pids) == [0, 2]
  stores.kill(0)
  stores.kill(0)  # a second time is fine
  assert stores.lost() == (0,)


def test_only_the_ranks_of_a_lost_store_move(stores):
  before = {rank: stores.address_for(rank) for rank in range(6)}
  stores.kill(1)
  after = {rank: stores.address_for(rank) for rank in range(6)}
  assert after == {r: None if r % 3 == 1 else a for r, a in before.items()}
  living = set(stores.addresses().values())
  moved = {rank: stores.retarget(rank) for rank in range(6)}
  assert {r: a for r, a in moved.items() if r % 3 != 1} == {
    r: a for r, a in before.items() if r % 3 != 1
  }
  assert {moved[1], moved[4]} == living, "two ranks, two stores"
  assert moved == {rank: stores.address_for(rank) for rank in range(6)}
  assert stores.ranks_of(1) == ()
  assert stores.address_for(7) in living, "a rank that comes later"


def test_without_stores_there_is_nowhere_to_go(stores):
  assert stores.address_for(0) is not None
  for i in range(3):
    stores.kill(i)
  assert stores.retarget(0) is None
  assert stores.address_for(0) is stores.address_for(5) is None
  assert stores.addresses() == stores.pids == {}
  assert stores.lost() == (0, 1, 2)


def test_a_worker_goes_on_and_streams_anew_elsewhere(stores, rng):
  warnings: list[str] = []
  stream = KVStream(1, KEY, warnings.append)
  stream.target(stores.address_for(1))
  data = rng.standard_normal((L, 4, K2, D)).astype(np.float32)
  for step in range(2):
    log_step(stream, step, data[:, step : step + 1], "a")
  assert stream.drain(WAIT_S)
  stores.kill(1)
  log_step(stream, 2, data[:, 2:3], "a")  # goes on without checkpoints
  assert not stream.drain(WAIT_S)
  assert len(warnings) == 1
  stream.target(stores.retarget(1))
  log_step(stream, 3, data[:, 3:], "a")  # is refused: the gap is seen
  assert stream.drain(WAIT_S)
  assert stream.take_refused() == {"a"}
  stream.rebase("a", data.swapaxes(1, 2))
  assert stream.drain(WAIT_S)
  client = DataClient(stores.address_for(1), KEY)
  (kv,) = client.pull("kv", "a")
  np.testing.assert_array_equal(kv, data.swapaxes(1, 2))
  client.close()
  stream.close()
  assert len(warnings) == 1


def test_one_of_them_can_be_slow(monkeypatch):
  started = []

  def start(*_: object, delay_s: float) -> None:
    started.append(delay_s)

  monkeypatch.setattr(kv_store, "start", start)
  Stores(3, SHAPE, "float32", KEY, delays_s={1: 0.5})
  assert started == [0.0, 0.5, 0.0]


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch):
  started = []
  real = kv_store.start

  def start(*args: object, **options: float) -> kv_store.StoreProcess:
    if len(started) == 2:
      raise ConnectionError("no address")
    started.append(real(*args, **options))
    return started[-1]

  monkeypatch.setattr(kv_store, "start", start)
  with pytest.raises(ConnectionError, match="no address"):
    Stores(3, SHAPE, "float32", KEY)
  assert [store.alive for store in started] == [False, False]


def test_no_store_at_all_is_an_error():
  with pytest.raises(ValueError, match="n=0"):
    Stores(0, SHAPE, "float32", KEY)
