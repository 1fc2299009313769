"""The command with a real engine: a tiny random model is broken and goes on."""

import json

import jax
import pytest

from experiments import run
from resilient_moe.model import ModelConfig, init_params, save_checkpoint
from resilient_moe.report import read_history
from tests.experiments.run_fake import config_file

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings("ignore:.*load_module:DeprecationWarning"),
]
MODEL = ModelConfig(
  n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, n_experts=4,
  expert_width=16,
)  # fmt: skip
OUTPUT_FIELDS = {
  "request_id",
  "prompt_tokens",
  "output_tokens",
  "finish_reason",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A folder with a model of random weights."""
  folder = tmp_path_factory.mktemp("random") / "model"
  save_checkpoint(folder, MODEL, init_params(MODEL, jax.random.key(0)))
  return str(folder)


def test_a_random_model_is_broken_and_recovered(
  tmp_path, checkpoint, monkeypatch, capsys
):
  # A program that came out of JAX's persistent cache lacks its kernels when it
  # is serialised again, as making a mesh ready does.
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  file = config_file(
    tmp_path,
    checkpoint=checkpoint,
    ranks=3,
    policies="restart_cached,kv_restore",
  )
  workdir = tmp_path / "out"
  status = run.launch(["run", f"--config={file}", f"--workdir={workdir}"])
  captured = capsys.readouterr()
  assert status == 0, captured.err
  assert "The fault-free run gives the same text: yes" in captured.out
  for policy in ("none", "restart_cached", "kv_restore"):
    place = workdir / "rank_lost_decode" / policy / "seed0"
    verdict = json.loads((place / "verdict.json").read_text())
    assert verdict["overall"] == "true", (policy, verdict)
    kinds = [event["event"] for event in read_history(place / "history.jsonl")]
    assert kinds.count("fault") == (policy != "none")
    outputs = (place / "outputs.jsonl").read_text().splitlines()
    assert len(outputs) == 4
    assert set(json.loads(outputs[0])) == OUTPUT_FIELDS
