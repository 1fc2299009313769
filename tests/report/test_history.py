"""The history's contract: what is written is what is read."""

import json
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from resilient_moe import report


def test_round_trip_and_memory_agree(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "history.jsonl"
  memory = report.History()
  with report.HistoryWriter(path) as writer:
    for out in (writer, memory):
      out.write("epoch", t=1.5, epoch=np.int32(1), mesh=(0, 2), note={3, 1})
      out.write("end", t=2)
    # Flushed as written, so that a killed run leaves what happened.
    assert len(path.read_text().splitlines()) == 2
  assert report.read_history(path) == memory
  assert memory[0] == {
      "event": "epoch", "t": 1.5, "epoch": 1, "mesh": [0, 2], "note": [1, 3]
  }  # fmt: skip


def test_time_is_since_the_start() -> None:
  now = iter([100.0, 100.25])
  history = report.History(clock=lambda: next(now))
  history.write("end")
  assert history[0]["t"] == 0.25


@pytest.mark.parametrize(
    ("event", "fields", "error"),
    [
        ("explosion", {}, "unknown event 'explosion'; choices: accepted"),
        ("epoch", {"epoch": 1}, "lacks mesh"),
        ("warning", {"text": float("nan")}, "not JSON compliant"),
    ],
)
def test_bad_events_are_refused(event: str, fields: dict, error: str) -> None:
  history = report.History()
  with pytest.raises(ValueError, match=error):
    history.write(event, **fields)
  assert not history


def test_a_cut_off_line(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "history.jsonl"
  whole = json.dumps({"event": "end", "t": 1.0})
  path.write_text(whole + "\n" + whole[:9])
  with pytest.raises(ValueError, match=r"history.jsonl:2: .*cut off"):
    report.read_history(path)
  assert len(report.read_history(path, partial_ok=True)) == 1


@pytest.mark.parametrize("line", ["{]", "[]", '{"t": 1}'])
def test_a_broken_line(tmp_path: pathlib.Path, line: str) -> None:
  path = tmp_path / "history.jsonl"
  path.write_text(line + '\n{"event": "end", "t": 1}\n')
  with pytest.raises(ValueError, match="history.jsonl:1: not"):
    report.read_history(path, partial_ok=True)


def test_threads_share_a_writer(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "history.jsonl"
  with report.HistoryWriter(path) as writer:

    def write() -> None:
      for _ in range(200):
        writer.write("warning", text="x" * 200)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  events = report.read_history(path)
  assert len(events) == 800
  times = [event["t"] for event in events]
  assert times == sorted(times)


def test_the_door_loads_neither_jax_nor_matplotlib() -> None:
  code = (
      "import sys, resilient_moe.report;"
      "sys.exit(bool({'jax', 'matplotlib'} & sys.modules.keys()))"
  )
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
