import csv

import pytest

from experiments import published

# ml_collections loads config files in a way that Python has deprecated.
pytestmark = pytest.mark.filterwarnings(
  "ignore:.*load_module:DeprecationWarning"
)
CONFIG = "--config=configs/published.py"


def _main(tmp_path, *more):
  workdir = tmp_path / "out"
  argv = ["published", CONFIG, f"--workdir={workdir}", *more]
  return published.main(argv), workdir


def test_it_leaves_three_tables(tmp_path, capsys):
  code, workdir = _main(tmp_path, "--config.only=revive,tarragon")
  assert code == 0
  with (workdir / "published.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert tuple(rows[0]) == published.COLUMNS
  assert {r["system"] for r in rows} == {"ReviveMoE", "Tarragon"}
  for row in rows:
    ratio = float(row["simulated"]) / float(row["published"])
    assert float(row["error"]) == pytest.approx(ratio - 1)
  text = (workdir / "published.md").read_text()
  assert "predicted numbers" in text
  assert "(missed)" in text
  assert text in capsys.readouterr().out
  tex = (workdir / "published.tex").read_text()
  assert tex.count(r"\midrule") == 2
  assert tex.count("{") == tex.count("}")
  for line in tex.splitlines():
    if line.endswith(r"\\") and "multicolumn" not in line:
      assert line.count("&") == 4, line
      assert "%" not in line.replace(r"\%", "")


def test_assumptions_can_be_varied(tmp_path):
  code, workdir = _main(
    tmp_path, "--config.only=tarragon", "--config.tarragon.requests_per_s=70.0"
  )
  assert code == 0
  assert "70 requests/s" in (workdir / "published.md").read_text()


@pytest.mark.parametrize(
  ("more", "message"),
  [
    ("--config.only=vllm", "unknown system 'vllm'; choices: revive"),
    ("--config.eep.slots_per_rank=40", "40 slots a rank"),
    ("--config.eep.gpu=a100", "unknown device 'a100'; choices: h100"),
    ("--config.eep.ranks=8", "ranks"),
  ],
)
def test_bad_input_is_one_error_and_leaves_nothing(
  tmp_path, capsys, more, message
):
  code, workdir = _main(tmp_path, more)
  assert code == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert message in error
  assert not workdir.exists()


def test_a_config_of_ones_own_may_not_name_what_there_is_not():
  with pytest.raises(ValueError, match="config.eep.ranks.*slots_per_rank"):
    published.compose({"only": "eep", "eep": {"ranks": 8}})


@pytest.mark.parametrize(
  ("value", "text"),
  [(0.0139, "0.0139"), (83.1, "83.1"), (6688, "6688"), (2.5e9, "2.5 G")],
)
def test_numbers_are_short(value, text):
  assert published.number(value) == text
