"""The store process: it lives as long as whoever started it."""

import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from resilient_moe.runtime.process import kv_store
from resilient_moe.runtime.process.data import DataClient
from resilient_moe.runtime.process.mirror import named_dtype
from resilient_moe.runtime.process.stream import KVStream

KEY = b"key of a test"
SHAPE = (2, 2, 32, 8)
WAIT_S = 30.0
MODULES = ("mirror", "data", "stream", "kv_store", "layer_log", "stores")

# Starts a store, says its process and waits to be killed.
PARENT = """
import time
from resilient_moe.runtime.process import kv_store
store = kv_store.start((2, 2, 32, 8), "float32", b"key of a test")
print(store.process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def store():
  made = kv_store.start(SHAPE, "float32", KEY)
  yield made
  made.close()
  assert made.process.returncode is not None


def test_what_is_streamed_to_it_is_pulled_by_others(store, rng):
  warnings: list[str] = []
  stream = KVStream(0, KEY, warnings.append)
  stream.target(store.address)
  delta = rng.standard_normal((2, 1, 5, 2, 8)).astype(np.float32)
  stream.put([("a", 1, 0, 4)], delta)
  assert stream.drain(WAIT_S)
  client = DataClient(store.address, KEY)
  (kv,) = client.pull("kv", "a")
  np.testing.assert_array_equal(kv, delta[:, 0, 1:].swapaxes(1, 2))
  assert not client.streams_ended(0, 0.05)
  stream.close()
  assert client.streams_ended(0, WAIT_S)
  assert warnings == []
  client.close()


def test_half_precision_is_kept_as_it_is():
  store = kv_store.start(SHAPE, "bfloat16", KEY)
  stream = KVStream(0, KEY, pytest.fail)
  stream.target(store.address)
  bits = np.arange(2 * 3 * 2 * 8, dtype=np.uint16).reshape(2, 1, 3, 2, 8)
  stream.put([("a", 0, 0, 3)], bits.view(named_dtype("bfloat16")))
  assert stream.drain(WAIT_S)
  client = DataClient(store.address, KEY)
  (kv,) = client.pull("kv", "a")
  assert kv.dtype == named_dtype("bfloat16")
  np.testing.assert_array_equal(kv.view(np.uint16), bits[:, 0].swapaxes(1, 2))
  client.close()
  stream.close()
  store.close()


def test_its_command_line_says_what_it_is_and_not_the_key(store):
  command = pathlib.Path(f"/proc/{store.process.pid}/cmdline").read_bytes()
  assert b"resilient_moe.runtime.process.kv_store" in command
  assert b"--shape=2,2,32,8" in command
  assert KEY.hex().encode() not in command


def test_another_key_gets_nothing(store):
  client = DataClient(store.address, b"another key")
  with pytest.raises(ConnectionError, match="reject"):
    client.records()


def test_a_slow_one_takes_each_message_late():
  store = kv_store.start(SHAPE, "float32", KEY, delay_s=0.1)
  stream = KVStream(0, KEY, pytest.fail)
  stream.target(store.address)
  began = time.monotonic()
  for start in range(3):
    stream.put([("a", 0, start, 1)], np.ones((2, 1, 1, 2, 8), np.float32))
  assert stream.drain(WAIT_S)
  assert time.monotonic() - began > 3 * 0.1
  client = DataClient(store.address, KEY)
  assert client.records() == {"a": 3}
  client.close()
  stream.close()
  store.close()


def test_it_is_alive_until_it_is_not(store):
  assert store.alive
  os.kill(store.process.pid, signal.SIGKILL)
  os.waitid(os.P_PID, store.process.pid, os.WEXITED | os.WNOWAIT)
  assert not store.alive


def test_it_exits_when_its_parent_lets_go(store):
  store._end.close()
  assert store.process.wait(WAIT_S) == 0


def test_it_does_not_outlive_a_killed_parent():
  parent = subprocess.Popen(
    [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
  )
  assert parent.stdout is not None
  store = os.pidfd_open(int(parent.stdout.readline()))
  os.kill(parent.pid, signal.SIGKILL)
  parent.communicate()
  ended, _, _ = select.select([store], [], [], WAIT_S)
  os.close(store)
  assert ended


def test_close_ends_one_that_is_stopped():
  store = kv_store.start(SHAPE, "float32", KEY)
  os.kill(store.process.pid, signal.SIGSTOP)
  store.close()
  assert store.process.returncode == -signal.SIGKILL
  store.close()  # a second time is fine


def test_one_that_can_not_start_is_an_error_that_says_so(capfd):
  with pytest.raises(ConnectionError, match="no address"):
    kv_store.start(SHAPE, "float31", KEY)
  assert "float31" in capfd.readouterr().err


def test_one_that_says_nothing_is_killed(monkeypatch):
  started = []
  real = subprocess.Popen

  def silent(command, **options):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    started.append(real(command, **options))
    return started[0]

  monkeypatch.setattr(subprocess, "Popen", silent)
  with pytest.raises(ConnectionError, match="no address"):
    kv_store.start(SHAPE, "float32", KEY, timeout_s=0.2)
  assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("module", MODULES)
def test_none_of_it_loads_jax(module):
  name = f"resilient_moe.runtime.process.{module}"
  code = (
    f"import sys, {name}\n"
    "print([m for m in ('jax', 'jaxlib', 'orbax') if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout == "[]\n"


def test_the_running_store_has_not_loaded_jax(store):
  mapped = pathlib.Path(f"/proc/{store.process.pid}/maps").read_text()
  assert "numpy" in mapped
  assert "jaxlib" not in mapped
