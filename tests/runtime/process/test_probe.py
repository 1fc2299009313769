"""Probes over the loopback, between real processes where it matters.

Bounds are wide: the machine may be busy. What a test says of compiled threads
it also shows to be false of Python threads, where those can't do it.
"""

import ctypes
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import time
from subprocess import PIPE

import pytest

from resilient_moe.runtime.process import probe

HOST = "127.0.0.1"
INTERVAL_S = 0.01
WAIT_S = 20.0  # for what should come within milliseconds

# Answers, and holds its lock when told to: a call by PyDLL doesn't release it.
TARGET = """
import ctypes, pathlib, sys
from resilient_moe.runtime.process import probe
print(probe.Responder.start("127.0.0.1", pathlib.Path(sys.argv[1])).port)
for microseconds in iter(sys.stdin.readline, ""):
  ctypes.PyDLL(None).usleep(int(microseconds))
  print("released", flush=True)
"""

# Watches the port that it is given, and says how long it was silent at most.
WATCHER = """
import pathlib, sys, time
from resilient_moe.runtime.process import probe
with probe.Prober(0.01, pathlib.Path(sys.argv[1])) as prober:
  prober.add(0, "127.0.0.1", int(sys.argv[2]))
  longest_s = 0.0
  print("watching", flush=True)
  for _ in range(1000):  # more than a second, in which it is not stopped
    longest_s = max(longest_s, prober.silence_s(0))
    time.sleep(0.001)
print(longest_s, flush=True)
"""


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
  """A folder that holds the compiled library."""
  folder = tmp_path_factory.mktemp("probe")
  if probe.library(folder) is None:
    pytest.skip("no C compiler")
  return folder


@pytest.fixture(params=["native", "fallback"])
def kind(request, monkeypatch, tmp_path):
  if request.param == "fallback":
    monkeypatch.setenv("CC", "false")
  return request.param


@pytest.fixture
def folder(kind, request, tmp_path):
  native = kind == "native"  # or without a compiler
  return request.getfixturevalue("compiled") if native else tmp_path


@pytest.fixture
def start(repository):
  """Starts Python on a script; what still runs at the end is killed."""
  children = []

  def start(script, *arguments):
    child = subprocess.Popen(
      [sys.executable, "-uc", script, *map(str, arguments)],
      cwd=repository, text=True, stdin=PIPE, stdout=PIPE,
    )  # fmt: skip
    children.append(child)
    return child

  yield start
  for child in children:
    child.kill()
    child.communicate()


@pytest.fixture
def prober(folder):
  with probe.Prober(INTERVAL_S, folder) as prober:
    yield prober


@pytest.fixture
def deaf():
  """A socket that takes probes and says nothing by itself."""
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
    end.bind((HOST, 0))
    end.settimeout(WAIT_S)
    yield end


def until(condition):
  """Waits for it; says whether it came."""
  ends = time.monotonic() + WAIT_S
  while time.monotonic() < ends:
    if condition():
      return True
    time.sleep(0.001)
  return False


def waiting(end):
  """How many datagrams a socket holds; takes them."""
  count = 0
  while select.select([end], [], [], 0.0)[0]:
    end.recv(64)
    count += 1
  return count


def open_files():
  """File descriptors of this process, without one that lists them."""
  listed = os.listdir("/dev/fd")
  return {int(fd) for fd in listed if os.path.exists(f"/dev/fd/{fd}")}


def test_a_responder_is_heard(prober, folder, kind):
  responder = probe.Responder.start(HOST, folder)
  assert responder.native == prober.native == (kind == "native")
  prober.add(5, HOST, responder.port)
  time.sleep(0.3)
  assert until(lambda: prober.silence_s(5) < 2 * INTERVAL_S)
  assert until(lambda: prober.missed(5) == 0)


def test_silence_and_misses_grow_together(prober, deaf):
  began = time.monotonic()
  prober.add(0, HOST, deaf.getsockname()[1])
  assert prober.missed(0) < 10
  assert until(lambda: prober.missed(0) >= 10)
  assert 9 * INTERVAL_S < prober.silence_s(0) < time.monotonic() - began


def test_a_miss_is_a_probe_that_had_its_whole_interval(folder, deaf):
  with probe.Prober(0.5, folder) as prober:
    prober.add(0, HOST, deaf.getsockname()[1])
    deaf.recv(64)
    time.sleep(0.1)
    assert prober.missed(0) == 0  # sent, and not yet due
    deaf.recv(64)
    assert until(lambda: prober.missed(0) == 1)


def test_a_late_answer_is_an_answer(prober, deaf):
  prober.add(0, HOST, deaf.getsockname()[1])
  first, sender = deaf.recvfrom(64)
  assert until(lambda: prober.missed(0) >= 40)
  before = prober.silence_s(0)
  deaf.sendto(b"\2" + first[1:], sender)
  assert until(lambda: prober.missed(0) < 20)
  assert prober.silence_s(0) < before


def test_only_well_formed_answers_count(prober, deaf):
  prober.add(0, HOST, deaf.getsockname()[1])
  asked, sender = deaf.recvfrom(64)
  answer = b"\2" + asked[1:]
  other = answer[:4] + b"\0\x10\0\0" + answer[8:]  # slot 4096: nobody's
  assert until(lambda: prober.missed(0) >= 10)
  before = prober.silence_s(0)
  for wrong in (asked, answer[:-1], answer + b"\0", b"", other):
    deaf.sendto(wrong, sender)
  time.sleep(3 * INTERVAL_S)
  assert prober.silence_s(0) > before


def test_a_responder_answers_probes_only(folder, deaf):
  address = (HOST, probe.Responder.start(HOST, folder).port)
  asked = b"\1" + bytes(range(15))
  answer = b"\2" + asked[1:]
  for wrong in (b"", asked[:-1], asked + b"\0", answer):
    deaf.sendto(wrong, address)
  deaf.sendto(asked, address)
  assert deaf.recv(64) == answer  # the first to come, though sent last
  time.sleep(0.05)
  assert waiting(deaf) == 0


def test_a_removed_target_is_not_asked_and_its_name_is_free(prober, deaf):
  port = deaf.getsockname()[1]
  prober.add(0, HOST, port)
  assert until(lambda: prober.missed(0) >= 20)
  prober.remove(0)
  waiting(deaf)
  time.sleep(0.1)
  assert waiting(deaf) == 0
  prober.add(0, HOST, port)
  assert prober.missed(0) < 20
  deaf.recv(64)


def test_an_answer_to_a_former_target_is_not_for_the_next(prober, deaf):
  prober.add(0, HOST, deaf.getsockname()[1])
  old, sender = deaf.recvfrom(64)
  prober.remove(0)
  prober.add(1, HOST, deaf.getsockname()[1])
  assert until(lambda: prober.missed(1) >= 10)
  before = prober.silence_s(1)
  deaf.sendto(b"\2" + old[1:], sender)
  time.sleep(3 * INTERVAL_S)
  assert prober.silence_s(1) > before


def test_targets_are_told_apart(prober, folder, deaf):
  for name in (3, 1, 2):
    prober.add(name, HOST, probe.Responder.start(HOST, folder).port)
  prober.add(0, HOST, deaf.getsockname()[1])
  assert until(lambda: prober.missed(0) >= 30)
  assert all(prober.missed(name) < 15 for name in (1, 2, 3))


def test_mistakes_are_named(prober, folder, deaf):
  port = deaf.getsockname()[1]
  prober.add(7, HOST, port)
  for call, message in (
    (lambda: prober.add(7, HOST, port), "target 7 is watched already"),
    (lambda: prober.add(8, "localhost", port), "host is 'localhost'"),
    (lambda: prober.add(8, HOST, 0), "port is 0"),
    (lambda: prober.remove(8), r"target 8 is not watched; watched are \[7\]"),
    (lambda: prober.missed(8), "target 8 is not watched"),
    (lambda: prober.silence_s(8), "target 8 is not watched"),
    (lambda: probe.Prober(0.0, folder), "interval_s is 0.0"),
    (lambda: probe.Responder.start("::1", folder), "host is '::1'"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  with pytest.raises(OSError, match=r"responder on 192\.0\.2\.1"):
    probe.Responder.start("192.0.2.1", folder)  # reserved for documentation


def test_a_closed_prober_is_silent_and_says_so(folder, deaf):
  with probe.Prober(INTERVAL_S, folder) as prober:
    prober.add(0, HOST, deaf.getsockname()[1])
    deaf.recv(64)
  prober.close()  # again
  waiting(deaf)
  time.sleep(0.1)
  assert waiting(deaf) == 0
  with pytest.raises(ValueError, match="closed"):
    prober.missed(0)


def test_a_stopped_process_misses_and_is_heard_again(prober, folder, start):
  child = start(TARGET, folder)
  prober.add(0, HOST, int(child.stdout.readline()))
  assert until(lambda: prober.silence_s(0) < INTERVAL_S)
  os.kill(child.pid, signal.SIGSTOP)
  assert until(lambda: prober.missed(0) >= 20)
  assert prober.silence_s(0) > 15 * INTERVAL_S
  os.kill(child.pid, signal.SIGCONT)
  assert until(lambda: prober.missed(0) == 0)
  assert prober.silence_s(0) < 15 * INTERVAL_S


def test_a_responder_whose_interpreter_is_busy_answers(
  compiled, folder, kind, start
):
  child = start(TARGET, folder)
  with probe.Prober(INTERVAL_S, compiled) as prober:
    prober.add(0, HOST, int(child.stdout.readline()))
    assert until(lambda: prober.silence_s(0) < INTERVAL_S)
    child.stdin.write("400000\n")
    child.stdin.flush()
    most, ends = 0, time.monotonic() + 0.4
    while time.monotonic() < ends:
      most = max(most, prober.missed(0))
      time.sleep(0.001)
    assert child.stdout.readline() == "released\n"
  assert most <= 8 if kind == "native" else most >= 12


def test_a_prober_whose_interpreter_is_busy_asks(prober, deaf, kind):
  prober.add(0, HOST, deaf.getsockname()[1])
  asked = []
  for _ in range(3):
    waiting(deaf)
    ctypes.PyDLL(None).usleep(300_000)
    asked.append(waiting(deaf))
  assert max(asked) >= 8 if kind == "native" else max(asked) <= 3


def test_a_stopped_prober_blames_nobody(folder, start):
  target = start(TARGET, folder)
  child = start(WATCHER, folder, int(target.stdout.readline()))
  assert child.stdout.readline() == "watching\n"
  for stopped in (target, child):  # as if the machine had paused
    os.kill(stopped.pid, signal.SIGSTOP)
  time.sleep(0.8)
  os.kill(child.pid, signal.SIGCONT)
  time.sleep(0.1)
  os.kill(target.pid, signal.SIGCONT)
  assert float(child.stdout.readline()) < 0.6


def test_a_stopped_prober_still_finds_who_died_meanwhile(folder, deaf, start):
  child = start(WATCHER, folder, deaf.getsockname()[1])
  assert child.stdout.readline() == "watching\n"
  asked, sender = deaf.recvfrom(64)
  os.kill(child.pid, signal.SIGSTOP)
  time.sleep(2.0)
  deaf.sendto(b"\2" + asked[1:], sender)  # its last; the prober is stopped
  os.kill(child.pid, signal.SIGCONT)
  assert float(child.stdout.readline()) > 0.2  # it was silent for a second
  assert waiting(deaf) < 250  # rounds that were not run are not made up for


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_signals_are_left_to_the_interpreters_own_threads(compiled, start):
  # A handler that runs elsewhere doesn't wake the main thread from its sleep.
  child = start(TARGET, compiled)
  child.stdout.readline()
  blocked = {}
  for thread in pathlib.Path(f"/proc/{child.pid}/task").iterdir():
    mask = (thread / "status").read_text().split("SigBlk:")[1].split()[0]
    blocked[int(thread.name)] = bool(int(mask, 16) >> signal.SIGINT - 1 & 1)
  assert not blocked.pop(child.pid)
  assert list(blocked.values()) == [True]  # the responder


def test_started_processes_do_not_inherit_the_sockets(compiled):
  before = open_files()
  with probe.Prober(INTERVAL_S, compiled):
    probe.Responder.start(HOST, compiled)
    inherited = [os.get_inheritable(fd) for fd in open_files() - before]
  assert inherited == [False, False]


def test_many_answers_at_once_do_not_overflow(compiled):
  ports = [probe.Responder.start(HOST, compiled).port for _ in range(16)]
  with probe.Prober(0.3, compiled) as prober:
    for name in range(2048):
      prober.add(name, HOST, ports[name % 16])
    time.sleep(1.5)  # five rounds, of which the last two were heard
    assert until(lambda: max(map(prober.missed, range(2048))) < 2)


def test_no_slot_is_left_beyond_the_maximum(compiled):
  with probe.Prober(60.0, compiled) as prober:
    for name in range(4096):
      prober.add(name, HOST, 9)
    with pytest.raises(OSError, match=f"target at {HOST}:9"):
      prober.add(4096, HOST, 9)
    prober.remove(17)
    prober.add(4096, HOST, 9)


def test_a_source_is_compiled_once(compiled, monkeypatch, tmp_path):
  (path,) = compiled.iterdir()  # nothing temporary is left
  monkeypatch.setenv("CC", "false")
  assert probe.library(compiled) is not None
  assert list(compiled.iterdir()) == [path]
  changed = tmp_path / "probe.c"
  changed.write_text(probe._SOURCE.read_text() + "/* changed */\n")
  monkeypatch.setattr(probe, "_SOURCE", changed)
  assert probe.library(compiled) is None


@pytest.mark.parametrize("compiler", ["false", "/no/such/compiler", "true"])
def test_a_failed_compilation_leaves_nothing(compiler, monkeypatch, tmp_path):
  monkeypatch.setenv("CC", compiler)
  assert probe.library(tmp_path / "new") is None
  assert list((tmp_path / "new").iterdir()) == []


def test_a_library_that_does_not_load_is_none(compiled, tmp_path):
  (path,) = compiled.iterdir()
  (tmp_path / path.name).write_bytes(b"not a library")
  assert probe.library(tmp_path) is None


def test_builders_do_not_disturb_each_other(compiled, monkeypatch, tmp_path):
  real = subprocess.run

  def run(*arguments, **options):
    monkeypatch.setattr(subprocess, "run", real)
    done = real(*arguments, **options)
    assert not list(tmp_path.glob("*.so"))  # nothing half done is seen
    assert probe.library(tmp_path)  # another one, which is ready first
    return done

  monkeypatch.setattr(subprocess, "run", run)
  assert probe.library(tmp_path)
  assert len(list(tmp_path.iterdir())) == 1
