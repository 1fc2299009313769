"""However a run ends, nothing of it is left: no process, port or file.

What hurts most is done in the middle of a start, when the engine, the workers
and the compiler are there and none of them is ready; and, to the engine, while
it serves with a worker that is stopped and could not notice.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from resilient_moe.faults import Fault
from resilient_moe.runtime.case import RunFailed
from tests.runtime.harness import Lab
from tests.runtime.process.harness import (
  ENGINE,
  LIMIT_S,
  WORKER,
  Event,
  Marked,
  Runs,
  at_most,
  command_line,
  listening,
  process_case,
)

pytestmark = pytest.mark.slow

STORE = "resilient_moe.runtime.process.kv_store"
COMPILER = "resilient_moe.runtime.ahead"
# 127.0.0.1 as the kernel writes it, by itself and mapped into IPv6.
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}
KWARGS = {"checkpoint": "host"}
INTERRUPTED = 130


def files(folder: pathlib.Path) -> set[str]:
  return {entry.name for entry in folder.iterdir()}


def test_while_it_serves_everybody_can_be_told_and_listens_on_the_loopback(
  lab: Lab, runs: Runs
) -> None:
  """And after the end there is nobody."""
  lines: list[str] = []
  ports: set[str] = set()

  def progress(event: Event) -> None:
    if event["event"] == "step" and not lines:
      pids = runs.marked.pids()
      ports.update(listening(pids))
      lines.extend(map(command_line, pids))

  case = process_case(lab, "kv_restore", ranks=2, policy_kwargs=KWARGS)
  runs(case, progress)
  for rank in range(2):
    (line,) = [x for x in lines if WORKER in x and f" rank={rank} " in x]
    assert " incarnation=0 " in line
  for module in (ENGINE, STORE):
    assert len([x for x in lines if module in x]) == 1
  # Supervisor, coordination service, store, and of each worker its data.
  assert len(ports) >= 5
  assert {port.split(":")[0] for port in ports} <= LOOPBACK
  assert runs.marked.left() == []
  assert files(runs.folder) == {"engine.log", "history.jsonl", "outputs.jsonl"}


def test_after_a_run_that_failed(lab: Lab, runs: Runs) -> None:
  fault = Fault("rank_lost", (0,), at_step=4)
  with pytest.raises(RunFailed, match="policy 'none' can't recover"):
    runs(process_case(lab, "none", fault, ranks=2))
  assert runs.marked.left() == []
  assert "history.jsonl" not in files(runs.folder)


def test_after_the_engine_is_killed(lab: Lab, runs: Runs) -> None:
  """One worker is stopped: it can't see sockets close."""
  done: list[int] = []

  def progress(event: Event) -> None:
    if event["event"] == "step" and event["step"] >= 5 and not done:
      done.extend(runs.marked.pids("rank=1"))
      os.kill(done[0], signal.SIGSTOP)
      runs.marked.kill(ENGINE)

  case = process_case(lab, "kv_restore", ranks=2, policy_kwargs=KWARGS)
  # Whether another engine takes over is not what this test is about.
  with contextlib.suppress(RunFailed):
    runs(case, progress)
  assert done
  assert runs.marked.left() == []


def launch(folder: pathlib.Path, marked: Marked) -> subprocess.Popen:
  """The command of an experiment, until all its processes are there."""
  launcher = subprocess.Popen(
    [sys.executable, "-m", "experiments.run",
     "--config=configs/runlocal.py", f"--workdir={folder}",
     "--config.runtime=process", "--config.policies=none",
     "--config.faults=none"],
    start_new_session=True, stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
  )  # fmt: skip
  for words in ((COMPILER,), (WORKER, "rank=3")):
    marked.wait(*words)
  return launcher


def until_it_talks(pid: int) -> None:
  """Until a process has a socket: it has then made all its arrangements."""
  give_up = time.monotonic() + LIMIT_S
  while time.monotonic() < give_up:
    for end in pathlib.Path(f"/proc/{pid}/fd").glob("*"):
      with contextlib.suppress(OSError):
        if str(end.readlink()).startswith("socket:"):
          return
    time.sleep(0.005)
  pytest.fail("it has no socket")


@pytest.mark.parametrize("sign", ["interrupted", "killed"])
def test_after_the_launcher_is(
  sign: str, tmp_path: pathlib.Path, marked: Marked
) -> None:
  """Ctrl-C reaches its whole process group, SIGKILL only itself.

  The engine waits for a worker that is stopped, so neither looks around.
  """
  with at_most(LIMIT_S, marked):
    launcher = launch(tmp_path / "out", marked)
    stopped = marked.wait(WORKER, "rank=3")
    until_it_talks(stopped)
    os.kill(stopped, signal.SIGSTOP)
    if sign == "interrupted":
      os.killpg(launcher.pid, signal.SIGINT)
      assert launcher.wait() == INTERRUPTED
    else:
      launcher.kill()
      assert launcher.wait() == -signal.SIGKILL
    assert marked.left() == []
  left = {p.name for p in (tmp_path / "out").rglob("*.jsonl")}
  assert left == set()
