"""Source of kill_a_rank.ipynb; `python -m experiments.notebooks.build`."""

# %% [markdown]
# # Kill a rank in mid-sentence
#
# A mixture-of-experts model is served on several *ranks*; each holds a part of
# the experts and the memory (KV) of its own requests. We lose one of them while
# it writes, and watch the sentence go on, token for token as if nothing had
# happened. Then we compare with what is usual: starting everything again.
#
# Works on CPU, on one GPU and on TPU. On Colab: *Runtime > Run all*.

# %% [parameters]
REPOSITORY = ""  # on Colab: the git URL of this repository
CHECKPOINT = "byte_moe"  # one that ships, or a folder of save_checkpoint
RANKS = 4
NEW_TOKENS = 64
FAULT_STEP = 20
POLICIES = "restart_cached,kv_restore"
WORKDIR = "runs/kill_a_rank"

# %%
# On Colab, install first.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("resilient_moe") is None:
  if not REPOSITORY:
    raise ValueError("set REPOSITORY above to the git URL of this repository")
  wanted = f"git+{REPOSITORY}"
  subprocess.run([sys.executable, "-m", "pip", "install", wanted], check=True)

# %%
# Where the ranks live: virtual CPU devices, or logical ranks on a GPU or TPU.
from experiments.notebooks import where

place = where.pick(RANKS)
print(place)

# %% [markdown]
# ## One call
#
# `rm.generate` serves prompts on `ranks` ranks, breaks what `faults` says, and
# recovers under a policy. `kv_restore` keeps copies of all experts, and each
# rank streams the KV of its requests to a neighbour; when a rank dies the
# survivors take its experts over, restore the KV and go on.

# %%
import pathlib

import configs
import resilient_moe as rm

shipped = pathlib.Path(rm.__file__).parent / "assets" / CHECKPOINT
config, params = rm.load_checkpoint(
  shipped if shipped.is_dir() else CHECKPOINT
)
prompts = ["The assert statement ", "A list is ", "If the file ", "class "]


def write(**more) -> list:  # type: ignore[no-untyped-def]
  """Four sentences."""
  return rm.generate(
    config, params, prompts, max_new_tokens=NEW_TOKENS, ranks=RANKS, **more
  )


quiet = write()
fault = {"kind": "rank_lost", "ranks": [RANKS - 1], "at_step": FAULT_STEP}
broken = write(policy="kv_restore", faults=[fault])
for prompt, before, after in zip(prompts, quiet, broken, strict=True):
  same = before.output_tokens == after.output_tokens
  print(f"{prompt}[{after.text}]\n  as without the fault: {same}\n")

# %%
assert [a.output_tokens for a in quiet] == [a.output_tokens for a in broken]

# %% [markdown]
# ## Against a restart
#
# The same requests and the same fault under each policy, by the command that
# makes the tables of a paper. Every policy gets an engine in a process of its
# own, so that a restart is one: the process ends, a fresh one loads the weights
# and its stored programs, and every request is prefilled again. The first run,
# `none`, is the fault-free twin that all others are checked against.

# %%
from experiments import run

status = run.launch([
  "run",
  f"--config={pathlib.Path(configs.__file__).parent / 'runlocal.py'}",
  f"--workdir={WORKDIR}",
  f"--config.checkpoint={CHECKPOINT}",
  f"--config.ranks={RANKS}",
  f"--config.runtime={place.runtime}",
  f"--config.fault_step={FAULT_STEP // 2}",
  f"--config.policies={POLICIES}",
])  # fmt: skip
assert status == 0, "a run failed or its history does not check"

# %% [markdown]
# ## Token for token
#
# Everything is read from the *history* that a run leaves. Here is the request
# that was hit nearest to its middle: what it had written before its rank died,
# and, in bold, what it wrote after.

# %%
import html

from IPython.display import HTML, Image, Markdown, display

from resilient_moe import report
from resilient_moe.serving.workload import decode

folder = pathlib.Path(WORKDIR) / "rank_lost_decode" / "kv_restore" / "seed0"
events = report.read_history(folder / "history.jsonl")
told = report.before_and_after(events, decode)
lost = next(e for e in events if e["event"] == "fault")
parts = [html.escape(part) for part in (told.prompt, told.before, told.after)]
display(HTML("<pre style='white-space: pre-wrap'>{}|{}<b>{}</b></pre>".format(
  *parts)))  # fmt: skip

# %%
# The same around the fault, one token a line.
emitted = [
  (event["t"] - lost["t"], position, token)
  for event in events if event["event"] == "step"
  for name, position, token in event["emitted"] if name == told.request_id
]  # fmt: skip
first = sum(seconds <= 0 for seconds, _, _ in emitted)  # after the fault
for number in range(max(first - 5, 0), min(first + 6, len(emitted))):
  seconds, position, token = emitted[number]
  if number == first:
    print(f"          -- rank {lost['ranks'][0]} is lost --")
  print(f"{1e3 * seconds:+8.1f} ms  {position:4d}  {decode([token])!r}")

# %% [markdown]
# ## How long it was silent

# %%
rows = report.rows_of(report.read_runs(WORKDIR))
lines = ["| policy | verdict | stall of a request of the lost rank (s) |"]
lines.append("|---|---|---|")
for row in rows:
  stall = row.stats["affected_stall_s"] if row.valid else None
  shown = f"{stall.median:.3f}" if stall else "-"
  lines.append(f"| {row.policy} | {row.verdict} | {shown} |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# Tokens per second around the fault, and where each policy's time went:

# %%
display(Image(f"{WORKDIR}/timeline.png", width=700))

# %%
from resilient_moe.report import style

with style.context():
  drawn = report.breakdown_figure(rows)
  if drawn is not None:
    png, _ = style.save(drawn, pathlib.Path(WORKDIR) / "breakdown")
    display(Image(str(png), width=450))

# %% [markdown]
# Next: `write_your_own_policy.ipynb`, and `which_policy_for_my_fleet.ipynb` for
# thousands of devices. Limits: seconds on virtual devices are the cost of the
# recovery itself, without detection; a real kill of real processes is
# `--config.runtime=process`.
