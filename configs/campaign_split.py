"""Both deployments are broken again and again, in one table.

  python -m experiments.campaign --config=configs/campaign_split.py \
      --workdir=runs/campaign_split

The shipped model on processes: four workers that do everything (the part
`collocated`), and two attention workers, four expert workers and a store of KV
checkpoints (`disaggregated`). Long runs lose twenty workers one after the
other, each once all are back; short ones go through the single scenarios: in
attention, in expert compute, in the exchange, in prefill, both roles at once, a
link that is slow or cut, the store, a worker that is stopped.

206 faults (213 kills) in 47 cases. Expected: every verdict `true`, no
request lost, no token repeated, none changed and all outputs exact, since no
policy here is lossy; about half an hour on 2 idle cores. The command can be
interrupted and goes on when it is given again; one case alone is
`--config.only=PART/SCENARIO/POLICY/seedN`.
"""

import ml_collections

from configs import campaign

LONG = "killed_twenty_times"
APART = "killed_twenty_times_apart"
GROWN = {"replace": True}
SINGLE = (
  "ew_lost", "ew_in_experts", "ew_in_exchange", "link_cut", "aw_lost",
  "aw_in_attention", "aw_in_exchange", "aw_in_prefill",
  "two_ews", "ew_and_aw", "ew_then_aw_during_recovery", "link_slow",
  "store_and_aw", "rank_stuck", "random", "maintenance",
)  # fmt: skip
# Which of them a policy goes through, besides the long run.
COVERED = {
  "tarragon": SINGLE,
  "kv_restore_host": ("store_and_aw",),
  "replica_promotion": ("ew_and_aw",),
  "revive_moe": ("two_ews",),
  "role_switch": ("aw_in_attention",),
}


def get_config() -> ml_collections.ConfigDict:
  """Four workers, then two and four."""
  config = campaign.get_config()
  config.exchange = {}
  config.seeds = "0"
  # A replacement takes seconds: requests must come for long enough.
  many = {"count": 160, "rate": 0.07}
  config.parts = {
    "collocated": {
      "scenarios": (
        f"{LONG},rank_lost_decode,rank_lost_prefill,two_at_once,"
        "during_recovery,neighbours,rank_stuck,store_and_rank"
      ),
      "policies": "kv_restore,kv_restore_host,replica_promotion",
      "workloads": {LONG: many},
      "leave_out": (
        "store_and_rank/kv_restore,store_and_rank/replica_promotion"
      ),
    },
    "disaggregated": {
      "deployment": "disaggregated",
      "ranks": 6,
      "attention": 2,
      "scenarios": ",".join((APART, *SINGLE)),
      "policies": ",".join(COVERED),
      "policy_kwargs": {name: {**GROWN, "losses": 2} for name in COVERED},
      # Two workers have the requests of four.
      "workload": {"rate": 0.12},
      "workloads": {APART: {"count": 200, "rate": 0.05}},
      "leave_out": ",".join(
        f"{scenario}/{policy}"
        for policy, covered in COVERED.items()
        for scenario in SINGLE
        if scenario not in covered
      ),
    },
  }
  # Each part has its own.
  del config.scenarios, config.policies, config.workloads, config.leave_out
  return config
