"""How much memory loading takes, measured in a process of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

import resilient_moe as rm
from resilient_moe.model.params import describe, expert_bytes, is_spec

CONFIG = rm.ModelConfig(
  vocab_size=4096, n_layers=4, d_model=512, n_heads=8, n_kv_heads=4,
  head_dim=64, n_experts=16, expert_width=384,
)  # fmt: skip
SHARD = 24_000_000
SLACK = 1.3  # of the largest file, beside what the ranks hold

# What a process takes that has loaded JAX and its programs, and its peak while
# the arrays of its ranks are loaded. (`ru_maxrss` would be its parent's.)
CODE = """
import json, pathlib, sys
import jax, numpy as np
from resilient_moe.mesh.executables import Executables
from resilient_moe.mesh.programs import InstanceShape
from resilient_moe.model import StepOptions
from resilient_moe.runtime.device_store import DeviceStore
from resilient_moe.runtime.weights import WeightTiers

def status(key):
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(key):
      return 1024 * int(line.split()[1])

folder, dtype, how, held = sys.argv[1:5]
held = json.loads(held)
from third_party import huggingface as hf
config = hf.read_config(folder, dtype)
options = StepOptions(rows=1, max_len=16, chunk=16, kv_block=16)
shape = InstanceShape(config, options, len(held[0]) if held else 1, 1)
executables = Executables(shape, None)
devices = jax.devices()[:max(1, len(held))]
if how == "engine":
  for device in devices:
    programs = executables.rank_programs(device)
jax.block_until_ready(jax.numpy.ones(8) + 1)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak so far
before = status("VmRSS")
if how == "engine":
  weights = WeightTiers(folder, dtype, host_copy=False)
  store = DeviceStore(shape, devices, executables)
  for rank, slots in enumerate(held):
    store.add(rank, weights.dense, weights.slots(slots))
  store.wait()
else:
  config, params = hf.load_huggingface(folder, dtype)
  jax.block_until_ready(params)
print(json.dumps([before, status("VmHWM")]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """157 MB in float32, in files of up to 24 MB."""
  path = tmp_path_factory.mktemp("large") / "model"
  rng = np.random.default_rng(0)
  import jax

  draw = lambda s: rng.random(s.shape, np.float32)
  params = jax.tree.map(draw, describe(CONFIG), is_leaf=is_spec)
  rm.save_huggingface(path, CONFIG, params, "mixtral", max_shard_bytes=SHARD)
  return path


def dense_bytes() -> int:
  import jax

  leaves = jax.tree.leaves(describe(CONFIG), is_leaf=is_spec)
  return sum(s.nbytes for s in leaves if not s.is_expert)


@pytest.mark.parametrize(
  ("how", "held"),
  [
    ("engine", [[0, 1, 2, 3, 4, 5]]),
    ("engine", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("all", []),
  ],
)
def test_loading_takes_little_more_than_what_is_held(
  how, held, folder, repository, monkeypatch
):
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")
  # Freed memory goes back at once, so that a peak is what was held.
  monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
  done = subprocess.run(
    [
      sys.executable, "-c", CODE, str(folder), "float32", how,
      json.dumps(held),
    ],
    cwd=repository, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  before, after = json.loads(done.stdout)
  experts = sum(map(len, held)) or CONFIG.n_experts
  ranks = max(1, len(held))
  holds = experts * expert_bytes(CONFIG) + ranks * dense_bytes()
  largest = max(f.stat().st_size for f in folder.glob("*.safetensors"))
  assert largest < 1.05 * SHARD
  print(f"{how} {held}: {(after - before) / 1e6:.0f} MB for {holds / 1e6:.0f}")
  assert holds / 2 < after - before <= holds + SLACK * largest
