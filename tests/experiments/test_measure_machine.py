import json
import os

import pytest

from experiments import measure_machine
from resilient_moe.sim.devices import device
from resilient_moe.sim.hardware import measured

SAMPLES = {
  "memory_bytes_per_s": [8e9, 16e9],
  "flops.fp32": [1e10, 4e10],
  "disk.bytes_per_s": [1e8, 2e8],
  "inter.latency_s": [3e-5, 2e-5],
  "inter.bytes_per_s": [1e9, 2e9],
  "process_start_s": [1.5, 1.2],
}


def test_what_it_writes_is_a_device(tmp_path, capsys):
  out = tmp_path / "new" / "machine.json"
  argv = ["measure_machine", f"--out={out}", "--devices=2", "--quick"]
  assert measure_machine.main(argv) == 0
  assert str(out) in capsys.readouterr().out
  found = json.loads(out.read_text())
  assert all(len(s) >= 2 for s in found["samples"].values())
  mine = measured(device("this-machine"), out)
  for name, figure in mine.figures():
    if name in found["figures"]:
      assert figure == found["figures"][name] > 0
      assert figure.source.startswith("measured: python -m experiments.")
    else:
      assert figure.assumed  # what only an engine can tell
  assert os.listdir(out.parent) == ["machine.json"]


def test_devices_share_the_machine():
  one, four = (measure_machine.figures(SAMPLES, n) for n in (1, 4))
  assert one["memory_bytes_per_s"] == 16e9
  assert one["process_start_s"] == 1.2
  assert one["inter.latency_s"] == 2e-5
  assert one["intra.bytes_per_s"] == 8e9
  for name in ("memory_bytes_per_s", "flops.fp32", "inter.bytes_per_s"):
    assert four[name] == one[name] / 4
  assert four["disk.bytes_per_s"] == one["disk.bytes_per_s"]
  with pytest.raises(ValueError, match="devices=0"):
    measure_machine.figures(SAMPLES, 0)


@pytest.mark.parametrize("argv", [[], ["--out=x", "more"], ["--outt=x"]])
def test_a_bad_command_line_is_one_error(argv, capsys):
  assert measure_machine.main(["measure_machine", *argv]) == 2
  assert capsys.readouterr().err.startswith("error: ")
