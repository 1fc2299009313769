"""The trace of a run: valid Chrome trace events, with everything in them."""

import json
import math
from typing import Any

import pytest

from resilient_moe import report
from tests.report import apart
from tests.report import synthetic as s

U = s.STEP_S
NEEDED = {
    "X": {"ts", "dur", "pid", "tid", "name"},
    "M": {"pid", "name", "args"},
    "C": {"ts", "pid", "name", "args"},
    "i": {"ts", "pid", "tid", "name", "s"},
    "b": {"ts", "pid", "cat", "id", "name"},
    "e": {"ts", "pid", "cat", "id", "name"},
}


def _span(name: str, t0: float, t1: float, rank=3, role="expert", **args):
  return {
      "name": name, "t0": t0, "t1": t1, "rank": rank, "role": role,
      "args": args,
  }  # fmt: skip


def _nests(slices: list[tuple[float, float]]) -> bool:
  opened: list[float] = []
  for start, end in sorted(slices, key=lambda x: (x[0], -x[1])):
    while opened and opened[-1] <= start + 1e-6:
      opened.pop()
    if opened and end > opened[-1] + 1e-6:
      return False
    opened.append(end)
  return True


def _by(events: list[dict], *keys: str) -> dict[Any, list[dict]]:
  found: dict[Any, list[dict]] = {}
  for event in events:
    found.setdefault(tuple(event.get(k) for k in keys), []).append(event)
  return found


def problems(trace: dict[str, Any]) -> list[str]:
  """What a viewer would refuse or draw wrongly; the rules of the format."""
  found: list[str] = []
  assert json.loads(json.dumps(trace, allow_nan=False)) == trace
  events = trace["traceEvents"]
  for event in events:
    if missing := NEEDED[event["ph"]] - event.keys():
      found.append(f"{event} lacks {missing}")
    if not all(isinstance(event.get(k, 0), int) for k in ("pid", "tid")):
      found.append(f"{event}: pid and tid are no numbers")
    if not (event.get("dur", 0) >= 0 and math.isfinite(event.get("ts", 0))):
      found.append(f"{event}: bad times")
    if event["ph"] == "i" and event.get("s") not in ("g", "p", "t"):
      found.append(f"{event}: bad scope")
  times = [e["ts"] for e in events if "ts" in e]
  if times != sorted(times):
    found.append("not sorted")
  if trace["displayTimeUnit"] not in ("ms", "ns"):
    found.append("bad unit")
  named = {e["pid"] for e in events if e["name"] == "process_name"}
  rows = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
  for event in events:
    if event["pid"] not in named:
      found.append(f"{event}: unnamed process")
    if event["ph"] in "Xi" and (event["pid"], event["tid"]) not in rows:
      found.append(f"{event}: unnamed row")
  complete = [e for e in events if e["ph"] == "X"]
  for row, mine in _by(complete, "pid", "tid").items():
    if not _nests([(e["ts"], e["ts"] + e["dur"]) for e in mine]):
      found.append(f"row {row}: slices overlap")
  asynchronous = [e for e in events if e["ph"] in "be"]
  for key, mine in _by(asynchronous, "cat", "id", "name").items():
    if [e["ph"] for e in mine] != ["b", "e"] * (len(mine) // 2):
      found.append(f"{key}: begins and ends don't pair")
  return found


def _names(trace: dict[str, Any], what: str = "process_name") -> list[str]:
  events = trace["traceEvents"]
  return [e["args"]["name"] for e in events if e["name"] == what]


def _rows(trace: dict[str, Any], process: str) -> dict[str, list[dict]]:
  """The timed events of one process, by the name of their row."""
  events = trace["traceEvents"]
  pid = next(
      e["pid"]
      for e in events
      if e["name"] == "process_name" and e["args"]["name"] == process
  )
  mine = [e for e in events if e["pid"] == pid]
  names = {
      e["tid"]: e["args"]["name"] for e in mine if e["name"] == "thread_name"
  }
  found: dict[str, list[dict]] = {}
  for event in mine:
    if event["ph"] in "Xi":
      found.setdefault(names[event["tid"]], []).append(event)
  return found


def _at(event: dict) -> float:
  """Steps since the run's start, less the time before the first."""
  return (event["ts"] / 1e6 - s.START_S) / U


def test_the_history_is_in_the_orchestrators_rows() -> None:
  trace = report.trace(s.recovered(), [])
  assert problems(trace) == []
  assert _names(trace) == ["orchestrator", "requests"]
  rows = _rows(trace, "orchestrator")
  assert [_at(e) for e in rows["steps"]] == pytest.approx(
      [0, 1, 2, 8, 9, 10, 12, 13, 14]
  )
  assert {e["name"] for e in rows["steps"]} == {"decode"}
  fault, failure = rows["faults"]
  assert fault["name"] == "fault: ranks_lost [3]"
  assert (fault["s"], _at(fault)) == ("g", 3)
  assert (failure["s"], _at(failure)) == ("t", 4)
  phases = [(e["name"], _at(e), e["dur"] / 1e6 / U) for e in rows["recovery"]]
  assert phases == [("detect", 3, 1), ("plan", 4, 1), ("resume", 5, 4)]
  actions = [(e["name"], _at(e), e["dur"] / 1e6 / U) for e in rows["resume"]]
  assert actions == [("RebuildMesh", 5, 1), ("CopyExperts", 6, 2)]
  assert [e["args"]["bytes"] for e in rows["repair"]] == [500]
  assert [e["name"] for e in rows["membership"]] == [
      "epoch 0", "epoch 1", "redundancy"
  ]  # fmt: skip
  assert [e["name"] for e in rows["plans"]] == ["resumed", "plan"][::-1]


def test_the_rate_of_tokens() -> None:
  events = report.trace(s.recovered(), [])["traceEvents"]
  rates = [
      e["args"]["tokens/s"] * U for e in events if e["name"] == "tokens/s"
  ]
  assert rates == pytest.approx(
      [2, 2, 2, 0, 0, 0, 0, 0, 1, 2, 2, 0, 2, 2, 1, 0], abs=1e-3
  )


def test_requests_are_slices_of_their_own() -> None:
  for events, count in ((s.recovered(), 2), (s.retried(), 2)):
    trace = report.trace(events, [])
    assert problems(trace) == []
    found = [e for e in trace["traceEvents"] if e["ph"] == "b"]
    assert [e["id"] for e in found] == ["1", "2"][:count]
    assert found[0]["args"]["tokens"] == 8
  ends = [e for e in trace["traceEvents"] if e["ph"] == "e"]
  assert [_at(e) for e in ends] == [16, 16]
  unfinished = report.trace(s.without(s.recovered(), "finished"), [])
  assert problems(unfinished) == []
  ends = [e for e in unfinished["traceEvents"] if e["ph"] == "e"]
  assert [_at(e) for e in ends] == [15, 15]


def test_workers_are_processes() -> None:
  spans = [
      _span("experts", 1.0, 2.0, rank=3, layer=4),
      _span("attend", 1.0, 2.0, rank=0, role="attention"),
      _span("attend", 1.0, 2.0, rank=10, role="attention"),
      _span("attend", 1.0, 2.0, rank=2, role="attention"),
      _span("block", 1.0, 2.0, rank=1, role="collocated"),
      _span("schedule", 1.0, 2.0, rank=0, role="orchestrator"),
  ]
  trace = report.trace(s.recovered(), spans)
  assert problems(trace) == []
  assert _names(trace) == [
      "orchestrator", "AW 0", "AW 2", "AW 10", "EW 3", "rank 1", "requests"
  ]  # fmt: skip
  rows = _rows(trace, "EW 3")
  (work,) = rows["work"]
  assert (work["ts"], work["dur"]) == (1e6, 1e6)
  assert work["args"]["layer"] == 4
  # Where the fault struck, and nowhere else.
  assert [e["s"] for e in rows["faults"]] == ["p"]
  assert "faults" not in _rows(trace, "AW 0")
  assert [e["name"] for e in _rows(trace, "orchestrator")["work"]] == [
      "schedule"
  ]


def test_kinds_that_overlap_have_rows_of_their_own() -> None:
  # Of two that begin at once, the one that holds the other comes first.
  inside = [_span("experts", 1.0, 2.0), _span("layer", 1.0, 3.0)]
  across = [*inside, _span("receive", 2.5, 3.5), _span("receive", 3.0, 4.0)]
  trace = report.trace(s.twin(), inside)
  assert [e["name"] for e in _rows(trace, "EW 3")["work"]] == [
      "layer", "experts"
  ]  # fmt: skip
  trace = report.trace(s.twin(), across)
  assert problems(trace) == []
  rows = _rows(trace, "EW 3")
  assert {name: len(mine) for name, mine in rows.items()} == {
      "layer": 1, "experts": 1, "receive": 1, "receive 2": 1
  }  # fmt: skip


def test_touching_is_no_overlap() -> None:
  times = [0.1 * n for n in range(50)]
  spans = [_span("x", a, b) for a, b in zip(times, times[1:], strict=False)]
  trace = report.trace([], spans)
  assert problems(trace) == []
  assert len(_rows(trace, "EW 3")["work"]) == 49
  b = s.Builder()
  for b.now_s in (0.2, 0.3):  # 0.3 - 0.1 < 0.2, as floats go
    b.write("engine", stage="x", seconds=0.1, generation=0)
  assert len(_rows(report.trace(b.end(), []), "orchestrator")["engine"]) == 2


def test_steps_that_seem_to_overlap_follow_one_another() -> None:
  late = s.edited(s.twin(), "step", 3, seconds=1.5 * U)
  trace = report.trace(late, [])
  assert problems(trace) == []
  steps = _rows(trace, "orchestrator")["steps"]
  assert [_at(e) for e in steps] == pytest.approx(range(8))


def test_ranks_that_step_apart_have_rows_of_their_own() -> None:
  trace = report.trace(apart.lost(), [])
  assert problems(trace) == []
  rows = _rows(trace, "orchestrator")
  assert "steps" not in rows
  # They overlap for half of the time, and keep their length.
  first, second = rows["steps of 0"], rows["steps of 1"]
  assert [_at(e) for e in first[:3]] == pytest.approx([-1, 1, 3])
  assert [_at(e) for e in second[:3]] == pytest.approx([0, 2, 4])
  assert {e["dur"] for e in first[:9] + second} == {2e6 * U}


def test_healing_is_seen() -> None:
  b = s.Builder(**apart.APART)
  b.now_s += U
  b.write("healed", by=0, rank=4, layer=1, experts=2, seconds=U / 2)
  trace = report.trace(b.end(), [])
  assert problems(trace) == []
  (healed,) = _rows(trace, "orchestrator")["healing"]
  assert healed["name"] == "AW 0 healed from 4"
  assert (_at(healed), healed["dur"]) == (0.5, 1e6 * U / 2)
  assert healed["args"]["experts"] == 2


def test_whatever_a_history_holds() -> None:
  b = s.Builder()
  b.accept(1)
  b.write("engine", stage="spawn", seconds=0.5, generation=0)
  b.write("warning", text="hm")
  b.write("infeasible", policy="p", reason="r")
  b.step(1)
  b.fault(1)
  b.fault(1, ranks=(2,))
  b.detect()
  b.write("stale", epoch=0, rank=3)
  b.write("step_failed", step=1, epoch=0)
  b.write("failed", request_id=1, reason="r")
  trace = report.trace(list(b.history), [_span("x", 0.0, 5.0)])
  assert problems(trace) == []
  rows = _rows(trace, "orchestrator")
  assert [e["name"] for e in rows["engine"]] == ["spawn", "warning"]
  assert len(rows["recovery"]) == 1  # of rank 2 nothing was reported
  assert problems(report.trace([], [])) == []


def test_the_checker_finds_what_is_wrong() -> None:
  def broken(**change: Any) -> list[str]:
    trace = report.trace(s.recovered(), [_span("x", 1.0, 2.0)])
    event = next(e for e in trace["traceEvents"] if e["name"] == "decode")
    event.update(change)
    return problems(trace)

  assert broken() == []
  assert broken(dur=-1.0)
  assert broken(ts=1e12)
  assert broken(pid=99)
  assert broken(tid=99)
  assert broken(dur=1.5e6 * U)
  assert broken(ph="i")


def test_a_folder_with_and_without_spans(tmp_path) -> None:
  s.store(tmp_path, s.recovered(), s.twin())
  folder = tmp_path / "one_rank/mesh_shrink/seed0"
  report.write_trace(folder, folder / "trace.json")
  trace = json.loads((folder / "trace.json").read_text())
  assert trace == report.trace(s.recovered(), [])
  with report.Spans(folder / "spans", 3, "expert", 0.0, clock=lambda: 0.0) as r:
    r.add("experts", 1.0, 2.0)
  with (folder / "history.jsonl").open("a") as file:
    file.write('{"event": "st')  # the run was killed
  report.write_trace(folder, folder / "trace.json")
  trace = json.loads((folder / "trace.json").read_text())
  assert problems(trace) == []
  assert "EW 3" in _names(trace)
