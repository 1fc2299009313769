"""Where workers live, told in a config; and processes on their way out."""

import os
import subprocess
import sys

import pytest

from resilient_moe.runtime.process.cluster import CUDA_ENVIRONMENT, Cluster
from resilient_moe.runtime.process.exits import exiting


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"platform": "abacus"}, "'abacus': choose one of cpu, cuda, tpu"),
    ({"listen": "here"}, "listen='here': needed is HOST:PORT"),
    ({"listen": "10.0.0.1:99999"}, "needed is HOST:PORT"),
    ({"spawn": False}, "workers that are started elsewhere must know the port"),
  ],
)
def test_what_can_not_be_is_refused(fields: dict, match: str) -> None:
  with pytest.raises(ValueError, match=match):
    Cluster(**fields)


def test_only_cuda_needs_switches_to_abort() -> None:
  assert Cluster().environment() == {"JAX_PLATFORMS": "cpu"}
  cuda = Cluster(platform="cuda").environment()
  assert cuda == {"JAX_PLATFORMS": "cuda", **CUDA_ENVIRONMENT}
  assert Cluster(listen="10.0.0.1:8476").host == "10.0.0.1"
  assert Cluster(listen="10.0.0.1:8476").port == 8476


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_on_its_way_out_from_the_kill_to_the_grave() -> None:
  assert not exiting(os.getpid())
  child = subprocess.Popen([sys.executable, "-c", "input()"],
                           stdin=subprocess.PIPE)  # fmt: skip
  try:
    assert not exiting(child.pid)
  finally:
    child.kill()
  os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
  assert exiting(child.pid), "a zombie"
  child.wait()
  assert child.stdin is not None
  child.stdin.close()
  assert exiting(child.pid), "nobody has this number"
