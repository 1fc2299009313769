"""The trace reader: small files always, the published ones where they are."""

import json
import os
import pathlib
import statistics

import pytest

from third_party import azure_traces

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = (
  HEADER + "2023-11-16 18:15:46.6805900,374,44\n"
  "2023-11-16 18:15:50.9951690,396,109\n"
  "2023-11-17 00:00:00,1,0\n"
)


def write(folder: pathlib.Path, text: str) -> pathlib.Path:
  path = folder / "trace.csv"
  path.write_text(text)
  return path


def test_records_start_at_zero(tmp_path):
  first, second, third = azure_traces.read(write(tmp_path, GOOD))
  assert first == azure_traces.Record(0.0, 374, 44)
  assert second.arrival_s == pytest.approx(4.314579)
  assert (third.context_tokens, third.generated_tokens) == (1, 0)
  assert third.arrival_s == pytest.approx(5 * 3600 + 44 * 60 + 13.31941)


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (2, 2), (9, 3)])
def test_a_limit_reads_the_first(tmp_path, limit, count):
  assert len(azure_traces.read(write(tmp_path, GOOD), limit)) == count


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "trace.csv:1: the header is ''; needed is 'TIMESTAMP,ContextTokens"),
    ("a,b,c\n", "trace.csv:1: the header is 'a,b,c'"),
    (GOOD + "2023-11-17 00:00:01,1\n", "trace.csv:5: 2 values; needed are 3"),
    (GOOD + "yesterday,1,1\n", "trace.csv:5: TIMESTAMP is 'yesterday'"),
    (GOOD + "2023-11-18,1.5,1\n", "trace.csv:5: ContextTokens is '1.5'"),
    (GOOD + "2023-11-18,1,-1\n", "trace.csv:5: GeneratedTokens is '-1'"),
    (GOOD + "2023-11-15,1,1\n", "trace.csv:5: 2023-11-15 is earlier"),
    (GOOD + "2023-11-18T00:00:00+00:00,1,1\n", "trace.csv:5: .* time zone"),
  ],
)
def test_bad_lines_are_named(tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    azure_traces.read(write(tmp_path, text))


def test_a_missing_file_names_the_published_ones(tmp_path):
  with pytest.raises(ValueError, match=r"no trace at .*Trace_code\.csv"):
    azure_traces.read(tmp_path / "absent.csv")
  with pytest.raises(ValueError, match="limit is -1"):
    azure_traces.read(write(tmp_path, GOOD), limit=-1)


@pytest.mark.parametrize(
  ("name", "count", "seconds", "context", "generated"),
  [("code", 8819, 3436, 2048, 28), ("conv", 19366, 3502, 1155, 211)],
)
def test_the_published_traces(
  repository, name, count, seconds, context, generated
):
  """The statistics that the README states."""
  folder = pathlib.Path(
    os.environ.get("RMOE_TRACES") or repository.parent / "shared" / "traces"
  )
  path = folder / azure_traces.FILES[name]
  if not path.is_file():
    pytest.skip(f"no {path.name}: set RMOE_TRACES to the folder that holds it")
  records = azure_traces.read(path)
  assert len(records) == count
  assert round(records[-1].arrival_s) == seconds
  assert round(statistics.fmean(r.context_tokens for r in records)) == context
  mean = statistics.fmean(r.generated_tokens for r in records)
  assert round(mean) == generated


@pytest.mark.parametrize("name", ["code", "conv"])
def test_what_ships_is_derived_from_the_published_traces(repository, name):
  folder = pathlib.Path(
    os.environ.get("RMOE_TRACES") or repository.parent / "shared" / "traces"
  )
  path = folder / azure_traces.FILES[name]
  if not path.is_file():
    pytest.skip(f"no {path.name}: set RMOE_TRACES to the folder that holds it")
  shipped = repository / "resilient_moe" / "assets" / "azure_statistics.json"
  found = azure_traces.statistics(azure_traces.read(path))
  assert json.loads(shipped.read_text())["traces"][name] == found


def test_statistics_of_a_few_requests_are_known_by_hand():
  at = [0.0, 0.2, 30.0, 61.0, 130.0, 130.5, 131.0, 181.0]
  records = [azure_traces.Record(t, 10 * i, i) for i, t in enumerate(at)]
  found = azure_traces.statistics(records)
  assert (found["requests"], found["minutes"]) == (8, 3)
  assert found["rate_per_s"] == pytest.approx(7 / 180, rel=1e-4)
  assert found["context_quantiles"][0] == [0.0, 0.0]
  assert found["context_quantiles"][-1] == [1.0, 70.0]
  assert found["rank_correlation"] == pytest.approx(1)
  with pytest.raises(ValueError, match="2 whole minutes"):
    azure_traces.statistics(records[:6])
