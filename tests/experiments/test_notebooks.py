"""The notebooks: equal to their sources, and they run."""

import json
import os
import pathlib

import pytest

from experiments.notebooks import build

nbformat = pytest.importorskip("nbformat")

# Small, and on what every machine has.
SMALL = {
  "kill_a_rank": {
    "RANKS": 2,
    "NEW_TOKENS": 16,
    "FAULT_STEP": 12,
    "POLICIES": "kv_restore",
  },
  "write_your_own_policy": {"RANKS": 2, "BESIDE": "none"},
  "which_policy_for_my_fleet": {
    "INSTANCES": "1",
    "DAYS": 1.0,
    "SEEDS": "0",
    "POLICIES": "mesh_shrink,spare",
    "MORE": "--config.jobs=1 --config.multiplier=30",
  },
}


@pytest.mark.parametrize("name", build.SOURCES)
def test_a_notebook_is_what_its_source_says(name):
  file = build.HERE / f"{name}.ipynb"
  assert file.read_text("utf-8") == build.text_of(name), (
    "run: python -m experiments.notebooks.build"
  )


@pytest.mark.parametrize("name", build.SOURCES)
def test_a_notebook_is_valid_and_has_no_outputs(name):
  book = nbformat.read(build.HERE / f"{name}.ipynb", as_version=4)
  nbformat.validate(book)
  code = [cell for cell in book.cells if cell.cell_type == "code"]
  assert all(not c.outputs and c.execution_count is None for c in code)
  tagged = [c for c in code if "parameters" in c.metadata.get("tags", ())]
  assert len(tagged) == 1
  known = {line.split(" = ")[0] for line in tagged[0].source.splitlines()}
  assert SMALL[name].keys() | {"REPOSITORY", "WORKDIR"} <= known


def test_every_source_is_built():
  files = {path.stem for path in build.HERE.glob("*.ipynb")}
  assert files == set(build.SOURCES) == set(SMALL)


def test_a_line_that_looks_like_a_cell_is_an_error():
  with pytest.raises(ValueError, match=r"# %% \[file NAME\]"):
    build.notebook("# %% [marked]\n# text")


def _with(book, values: dict, workdir: pathlib.Path):
  """The notebook with a cell after its parameters, as papermill does it."""
  at = next(
    i for i, cell in enumerate(book.cells)
    if "parameters" in cell.metadata.get("tags", ())
  )  # fmt: skip
  given = {**values, "WORKDIR": str(workdir)}
  lines = [f"{name} = {value!r}" for name, value in given.items()]
  book.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(lines)))
  return book


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
  """A model that compiles quickly and writes nonsense."""
  jax = pytest.importorskip("jax")
  from resilient_moe import ModelConfig, init_params, save_checkpoint

  config = ModelConfig(
    vocab_size=256, n_layers=1, d_model=32, n_heads=2, n_kv_heads=1,
    head_dim=16, n_experts=4, top_k=2, expert_width=32,
  )  # fmt: skip
  folder = tmp_path_factory.mktemp("tiny") / "model"
  save_checkpoint(folder, config, init_params(config, jax.random.key(0)))
  return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", build.SOURCES)
@pytest.mark.filterwarnings("default")  # of Jupyter's own
def test_a_notebook_runs(name, tmp_path, repository, monkeypatch, tiny):
  nbclient = pytest.importorskip("nbclient")
  pytest.importorskip("ipykernel")
  paths = [str(repository), os.environ.get("PYTHONPATH", "")]
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  # The notebook says how many devices it needs.
  monkeypatch.delenv("JAX_NUM_CPU_DEVICES", raising=False)
  monkeypatch.delenv("JAX_NUMPY_RANK_PROMOTION", raising=False)
  book = nbformat.read(build.HERE / f"{name}.ipynb", as_version=4)
  values = dict(SMALL[name])
  if "CHECKPOINT" in book.cells[1].source:
    values["CHECKPOINT"] = tiny
  book = _with(book, values, tmp_path / "run")
  client = nbclient.NotebookClient(
    book,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  )
  client.execute()
  shown = json.dumps([cell.get("outputs") for cell in book.cells])
  assert "image/png" in shown
