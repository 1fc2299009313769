"""The spans of a process, and what is left of them if it is killed."""

import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time

import numpy as np
import pytest

from resilient_moe.report import Spans, read_spans

START_S = 100.0


class Clock:
  def __init__(self) -> None:
    self.now_s = START_S

  def __call__(self) -> float:
    return self.now_s


def _spans(folder, rank=3, role="expert", **kwargs) -> Spans:
  return Spans(folder, rank, role, START_S, clock=Clock(), **kwargs)


def test_a_span_comes_back_as_it_was_given(tmp_path: pathlib.Path) -> None:
  with _spans(tmp_path) as spans:
    spans.add("send", 101.5, 102.0)
    spans.add("experts", 100.25, 101.5, layer=2, tokens=np.int32(7), to=[1, 2])
  first, second = read_spans(tmp_path)
  assert first == {
      "name": "experts", "t0": 0.25, "t1": 1.5, "rank": 3, "role": "expert",
      "args": {"layer": 2, "tokens": 7, "to": [1, 2]}, "incarnation": 0,
  }  # fmt: skip
  assert (second["name"], second["t0"], second["args"]) == ("send", 1.5, {})
  line = (tmp_path / "rank3.0.jsonl").read_text().splitlines()[0]
  assert json.loads(line).keys() == first.keys() - {"incarnation"}


def test_a_context_records_from_its_start_to_its_end(tmp_path) -> None:
  with _spans(tmp_path) as spans:
    with spans.span("gate", layer=1):
      spans.clock.now_s += 2.0
    with pytest.raises(OSError, match="gone"), spans.span("receive"):
      raise OSError("gone")
  gate, receive = read_spans(tmp_path)
  assert (gate["name"], gate["t0"], gate["t1"]) == ("gate", 0.0, 2.0)
  assert gate["args"] == {"layer": 1}
  assert receive["args"] == {"error": "OSError"}


def test_without_a_folder_nothing_is_recorded(tmp_path, monkeypatch) -> None:
  monkeypatch.chdir(tmp_path)
  with Spans(None, 0, "expert", 0.0, limit=1) as spans:
    spans.add("x", 0.0, 1.0)
    with spans.span("y"):
      spans.flush()
    assert not spans._waiting
    assert spans.span("y") is spans.span("z")  # no object for each
  assert list(tmp_path.iterdir()) == []
  assert read_spans(tmp_path / "missing") == []


def test_spans_are_written_after_so_many_or_so_long(tmp_path) -> None:
  with _spans(tmp_path, limit=3, every_s=10.0) as spans:
    for number in range(1, 5):
      spans.add("x", START_S, START_S)
      assert len(read_spans(tmp_path)) == number // 3 * 3
    spans.add("x", START_S, START_S + 10.0)  # waited for long enough
    assert len(read_spans(tmp_path)) == 5
    spans.clock.now_s = START_S + 20.0
    spans.flush()
    spans.add("x", START_S, START_S + 20.0)  # that was just now
    assert len(read_spans(tmp_path)) == 5
  assert len(read_spans(tmp_path)) == 6


def test_after_close_nothing_is_recorded(tmp_path) -> None:
  spans = _spans(tmp_path)
  spans.close()
  spans.add("late", START_S, START_S)
  spans.close()
  assert read_spans(tmp_path) == []


def test_a_torn_last_line_is_left_out(tmp_path) -> None:
  with _spans(tmp_path) as spans:
    spans.add("whole", START_S, START_S)
    spans.add("torn", START_S, START_S)
  file = tmp_path / "rank3.0.jsonl"
  whole = file.read_bytes()
  for cut in range(1, len(whole.splitlines()[1]) + 1):
    file.write_bytes(whole[:-cut] + "é".encode()[:1])
    assert [s["name"] for s in read_spans(tmp_path)] == ["whole"]


@pytest.mark.parametrize("line", ["{torn\n", '{"name": "x"}\n', "[]\n"])
def test_a_bad_line_elsewhere_is_an_error(tmp_path, line) -> None:
  (tmp_path / "rank3.0.jsonl").write_text(line)
  with pytest.raises(ValueError, match=r"rank3\.0\.jsonl:1: not"):
    read_spans(tmp_path)


def test_a_new_process_never_writes_over_an_old_one(tmp_path) -> None:
  for name in ("first", "second"):
    with _spans(tmp_path) as spans:
      spans.add(name, START_S, START_S)
  found = [(s["name"], s["incarnation"]) for s in read_spans(tmp_path)]
  assert found == [("first", 0), ("second", 1)]


@pytest.mark.parametrize("bad", [float("nan"), {1, 2}])
def test_what_is_no_json_is_an_error(tmp_path, bad) -> None:
  with _spans(tmp_path) as spans:
    spans.add("x", START_S, START_S, value=bad)
    with pytest.raises((ValueError, TypeError)):
      spans.flush()
    spans.add("x", float("nan"), START_S)
    with pytest.raises(ValueError, match="span 'x': times nan"):
      spans.flush()


def test_threads_lose_nothing(tmp_path) -> None:
  with _spans(tmp_path, limit=7) as spans:
    work = lambda: [spans.add("x", START_S, START_S) for _ in range(5000)]
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  assert len(read_spans(tmp_path)) == 20000


def _until_killed(folder: pathlib.Path) -> None:
  spans = Spans(folder, 0, "attention", time.monotonic(), limit=10, every_s=9e9)
  for _ in range(25):
    now_s = time.monotonic()
    spans.add("x", now_s, now_s)
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_loses_its_tail_only(tmp_path) -> None:
  context = multiprocessing.get_context("spawn")
  process = context.Process(target=_until_killed, args=(tmp_path,))
  process.start()
  process.join(60)
  assert process.exitcode == -signal.SIGKILL
  assert len(read_spans(tmp_path)) == 20
