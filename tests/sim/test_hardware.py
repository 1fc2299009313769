import dataclasses
import json
import pickle

import pytest

from resilient_moe.sim.devices import DEVICES, device, sources
from resilient_moe.sim.hardware import Figure, assumed, measured, replace

WANTED = (
  "h100", "h200", "b200", "tpu-v5e", "tpu-v5p", "tpu-v6e", "ascend-910c",
  "this-machine",
)  # fmt: skip


def test_the_devices_of_the_issue_are_there():
  assert set(WANTED) == set(DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_every_number_has_a_source_or_says_why_not(name):
  found = sources(name)
  assert len(found) >= 27
  for number, value, source in found:
    assert value > 0, number
    reason = source.removeprefix("assumed").removeprefix(": ")
    assert len(reason) > 5, number


@pytest.mark.parametrize("name", [n for n in WANTED if n != "this-machine"])
def test_what_a_data_sheet_states_is_not_assumed(name):
  stated = (
    "memory_bytes", "memory_bytes_per_s", "flops.bf16", "devices_per_node",
    "intra.bytes_per_s", "inter.bytes_per_s",
  )  # fmt: skip
  by_name = {n: s for n, _, s in sources(name)}
  assert not [n for n in stated if by_name[n].startswith("assumed")]


def test_nothing_pretends_that_this_machine_was_measured():
  assert all(s.startswith("assumed") for _, _, s in sources("this-machine"))


def test_a_figure_is_a_number_that_keeps_its_source():
  figure = Figure(3.0, "a sheet")
  assert figure * 2 == 6.0
  copy = pickle.loads(pickle.dumps(figure))
  assert (copy, copy.source, copy.assumed) == (3.0, "a sheet", False)
  assert assumed(1.0, "a guess").assumed


def test_numbers_are_replaced_by_name_at_any_depth():
  h100 = device("h100")
  slow = replace(
    h100,
    disk__bytes_per_s=Figure(1e9, "test"),
    flops__fp8=Figure(1e12, "test"),
    compile_s=Figure(1.0, "test"),
  )
  assert slow.disk.bytes_per_s == 1e9
  assert slow.disk.latency_s == h100.disk.latency_s
  assert slow.flops("fp8") == 1e12
  assert slow.compile_s == 1.0
  assert slow.compile_s.source == "test"
  with pytest.raises(ValueError, match="disk_rate.*compile_s"):
    replace(h100, disk_rate=Figure(1.0, "test"))


def test_a_device_without_fp8_computes_it_in_bf16():
  v5e = device("tpu-v5e")
  assert v5e.flops("fp8") == v5e.flops("bf16")
  with pytest.raises(ValueError, match="int4.*fp32, bf16, fp8"):
    v5e.flops("int4")


@pytest.mark.parametrize(
  ("name", "value"), [("compile_s", 0.0), ("memory_efficiency", 1.5)]
)
def test_bad_numbers_are_refused(name, value):
  with pytest.raises(ValueError, match=name):
    replace(device("h100"), **{name: Figure(value, "test")})


def test_measurements_replace_assumptions(tmp_path):
  path = tmp_path / "machine.json"
  path.write_text(
    json.dumps({
      "command": "python -m experiments.measure_machine",
      "figures": {"memory_bytes_per_s": 1.5e10, "disk.bytes_per_s": 2e8},
    })
  )  # fmt: skip
  base = device("this-machine")
  mine = measured(base, path)
  assert mine.memory_bytes_per_s == 1.5e10
  assert mine.memory_bytes_per_s.source.startswith("measured: python -m")
  assert mine.compile_s == base.compile_s
  path.write_text("{}")
  with pytest.raises(ValueError, match="no 'figures'"):
    measured(base, path)


def test_an_unknown_device_names_the_choices():
  with pytest.raises(ValueError, match="a100.*h100"):
    device("a100")


def test_devices_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    device("h100").name = "mine"  # type: ignore[misc]
