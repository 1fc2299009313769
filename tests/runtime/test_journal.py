"""What a gateway that was killed has promised, read back from its history."""

import json
import os
import pathlib
import time

import pytest

from resilient_moe.runtime.journal import Progress, read_journal
from resilient_moe.serving.request import Request

REQUESTS = (
  Request("a", (1, 2), max_new_tokens=3, seed=1),
  Request("b", (3,), max_new_tokens=2, temperature=0.5),
  Request("late", (4,), max_new_tokens=2, arrival_s=9.0),
)
RUN = {"event": "run", "t": 0.0, "policy": "kv_restore"}


def accepted(name: str, t: float = 0.0, **fields: object) -> dict:
  return {
    "event": "accepted", "t": t, "request_id": name, "prompt_tokens": [1],
    "max_new_tokens": 3, "retry_of": None, **fields,
  }  # fmt: skip


def step(number: int, epoch: int, *emitted: tuple) -> dict:
  return {
    "event": "step", "t": float(number), "step": number, "epoch": epoch,
    "bucket": 0, "seconds": 0.1, "prefill_tokens": 0, "emitted": list(emitted),
  }  # fmt: skip


def write(path: pathlib.Path, *events: dict, torn: str = "") -> pathlib.Path:
  lines = "".join(json.dumps(event) + "\n" for event in events)
  path.write_text(lines + torn)
  return path


def test_requests_tokens_and_progress_come_back(tmp_path: pathlib.Path) -> None:
  path = write(
    tmp_path / "journal", RUN, accepted("a"), accepted("b"),
    {"event": "engine", "t": 0.5, "stage": "spawn", "seconds": 1.0,
     "generation": 2},
    step(6, 3, ("a", 2, 70), ("b", 1, 80)), step(7, 4, ("b", 2, 81)),
    {"event": "finished", "t": 7.5, "request_id": "b", "reason": "length",
     "tokens": 2},
  )  # fmt: skip
  journal = read_journal(path, REQUESTS)
  assert journal is not None
  assert journal.answers["a"].request is REQUESTS[0]
  assert journal.answers["a"].tokens == [70]
  assert journal.answers["a"].reason == ""
  assert journal.answers["b"].tokens == [80, 81]
  assert journal.answers["b"].reason == "length"
  assert "late" not in journal.answers, "it was not accepted yet"
  assert journal.progress == Progress(generation=2, epoch=4, first_step=8)
  assert journal.last_s == 7.5


def test_a_torn_line_is_cut_off_and_counts_for_nothing(
  tmp_path: pathlib.Path,
) -> None:
  whole = [RUN, accepted("a"), step(1, 0, ("a", 2, 70))]
  torn = json.dumps(step(2, 0, ("a", 3, 71)))[:-9]
  path = write(tmp_path / "journal", *whole, torn=torn)
  journal = read_journal(path, REQUESTS)
  assert journal is not None
  assert journal.answers["a"].tokens == [70]
  assert path.read_text().splitlines() == [json.dumps(e) for e in whole]


def test_what_was_shed_failed_or_sent_again_is_known(
  tmp_path: pathlib.Path,
) -> None:
  path = write(
    tmp_path / "journal", RUN, accepted("a"),
    {"event": "shed", "t": 0.0, "request_id": "b", "reason": "too long"},
    {"event": "failed", "t": 1.0, "request_id": "a", "reason": "rank lost"},
    accepted("a~1", 1.0, retry_of="a"),
  )  # fmt: skip
  journal = read_journal(path, REQUESTS)
  assert journal is not None
  assert journal.answers["b"].reason == "shed: too long"
  assert journal.answers["a"].reason == "failed: rank lost"
  again = journal.answers["a~1"].request
  assert (again.prompt, again.seed) == (REQUESTS[0].prompt, REQUESTS[0].seed)
  assert (again.request_id, again.retry_of) == ("a~1", "a")
  assert again.arrival_s is None


def test_the_time_that_nobody_served_counts(tmp_path: pathlib.Path) -> None:
  path = write(tmp_path / "journal", RUN, accepted("a"))
  before = time.time() - 30.0
  os.utime(path, (before, before))
  journal = read_journal(path, REQUESTS)
  assert journal is not None
  assert journal.down_s == pytest.approx(30.0, abs=10.0)


@pytest.mark.parametrize("torn", ["", '{"event": "ru'])
def test_nothing_has_begun(tmp_path: pathlib.Path, torn: str) -> None:
  assert read_journal(write(tmp_path / "journal", torn=torn), REQUESTS) is None
