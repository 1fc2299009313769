"""Source of which_policy_for_my_fleet.ipynb (see build.py)."""

# %% [markdown]
# # Which policy for my fleet?
#
# The simulator runs the *same policy objects* as the real runtimes, over a cost
# model in virtual time: weeks of failures on thousands of devices in seconds.
# We choose a model and hardware, look at how often things break, how much
# memory redundancy takes, and what each policy makes of it.

# %% [parameters]
REPOSITORY = ""  # on Colab: the git URL of this repository
MODEL = "deepseek-v3"
DEVICE = "h200"
RANKS = 64  # of an expert-parallel group
INSTANCES = "1,4,16"  # groups: 64, 256, 1,024 devices
DAYS = 7.0
RATE = "rsc1"
SEEDS = "0,1"
POLICIES = "restart_cached,mesh_shrink,replica_promotion,kv_restore,spare"
MORE = ""  # further flags of experiments.fleet, with blanks
WORKDIR = "runs/which_policy_for_my_fleet"

# %%
# On Colab, install first. No accelerator is needed.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("resilient_moe") is None:
  if not REPOSITORY:
    raise ValueError("set REPOSITORY above to the git URL of this repository")
  wanted = f"git+{REPOSITORY}"
  subprocess.run([sys.executable, "-m", "pip", "install", wanted], check=True)

# %% [markdown]
# ## Models and hardware that are known

# %%
from resilient_moe.sim import devices, shapes

model, device = shapes.shape(MODEL), devices.device(DEVICE)
print("models:", ", ".join(shapes.MODELS))
print(
  f"\n{model.name}: {model.n_experts} experts of"
  f" {model.expert_bytes / 1e9:.2f} GB (all layers), top {model.top_k};"
  f" {model.token_kv_bytes / 1e3:.1f} kB of KV a token"
)
print(f"\n{device.name}, every number with its source:")
for name, figure in device.figures():
  print(f"  {name:24s} {figure:<9.3g} {figure.source}")

# %% [markdown]
# ## How often something breaks
#
# Published rates, with their sources. A group stops when any of its ranks does.

# %%
from IPython.display import Image, Markdown, display

from resilient_moe.sim.failure_rates import RATES

lines = ["| rate | failures a node and day | days between a group's | source |"]
lines.append("|---|---|---|---|")
for rate in RATES.values():
  if not rate.per_node_day:
    continue  # for comparison: nothing breaks
  between = 1 / (rate.per_node_day * RANKS / 8)
  lines.append(
    f"| {rate.name} | {rate.per_node_day:.2e} | {between:.1f} | {rate.source} |"
  )
display(Markdown("\n".join(lines)))

# %% [markdown]
# ## What fits
#
# Memory of a rank, and which failures each way of keeping experts survives, by
# asking the real policies for plans.

# %%
import pathlib

import configs
from experiments import plan

folder = pathlib.Path(configs.__file__).parent
status = plan.main([
  "plan",
  f"--config={folder / 'plan.py'}",
  f"--config.model={MODEL}",
  f"--config.ranks={RANKS}",
  f"--config.device_memory_gb={device.memory_bytes / 1e9}",
])  # fmt: skip
assert status == 0

# %% [markdown]
# ## Weeks of failures
#
# Hosts and racks that take their devices along, stragglers, failures during
# recovery; load with the statistics of Azure's conversation trace.

# %%
from experiments import fleet

status = fleet.launch([
  "fleet",
  f"--config={folder / 'fleet.py'}",
  f"--workdir={WORKDIR}",
  f"--config.model={MODEL}",
  f"--config.device={DEVICE}",
  f"--config.ranks={RANKS}",
  f"--config.instances={INSTANCES}",
  f"--config.days={DAYS}",
  f"--config.rate={RATE}",
  f"--config.seeds={SEEDS}",
  f"--config.policies={POLICIES}",
  *MORE.split(),
])  # fmt: skip
assert status == 0

# %% [markdown]
# ## Pictures
#
# How long a stopped request waits, as the fleet grows:

# %%
def show(name: str) -> None:
  """A picture, if there is one: without failures nothing is stopped."""
  file = pathlib.Path(WORKDIR, name)
  display(Image(str(file), width=700) if file.is_file() else "nothing to draw")


show("stall_scale.png")

# %% [markdown]
# What redundancy takes against what it gives. The dashed line joins the
# policies that no other beats in both: choose on it.

# %%
show("redundancy_availability.png")

# %%
import json

lines = pathlib.Path(WORKDIR, "samples.jsonl").read_text().splitlines()
samples = [json.loads(line) for line in lines]
largest = max(sample["devices"] for sample in samples)
goodput: dict[str, list[float]] = {}
for sample in samples:
  if sample["devices"] == largest:
    values = goodput.setdefault(sample["policy"], [])
    values.append(sample["goodput_tokens_per_s"])
means = {name: sum(v) / len(v) for name, v in goodput.items()}
ranking = sorted(means.items(), key=lambda item: -item[1])
best = ranking[0][0]
for name, value in ranking:
  print(f"{name:20s} {value / means[best]:.4f} of the best goodput")
print(f"\nOn {largest:,} devices, with these rates: {best}")

# %% [markdown]
# Simulated numbers are as good as their cost model: `table.md` beside the
# pictures says what it was made of. Change `RATE`, `DEVICE` or `POLICIES`, or
# run `python -m experiments.fleet --config=configs/fleet.py` for 30 days on up
# to 10,240 devices.
