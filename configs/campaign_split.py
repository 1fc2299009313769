"""Both deployments are broken again and again, in one table.

  python -m experiments.campaign --config=configs/campaign_split.py \
      --workdir=runs/campaign_split

The shipped model on processes: four workers that do everything (the part
`collocated`), and two attention workers, four expert workers and a store of KV
checkpoints (`disaggregated`). Long runs lose twenty workers one after the
other, each once all are back; short ones go through the single scenarios: in
attention, in expert compute, in the exchange, in prefill, both roles at once, a
link that is slow or cut, the store, a worker that is stopped.

241 faults (247 kills) in 64 cases. Expected: every verdict `true`, no request
lost, no token repeated, none changed and all outputs exact, since no policy
here is lossy; some 30 minutes on 2 idle cores. The command can be interrupted
and goes on when it is given again. One deployment only:
`--config.only_parts=disaggregated`; one case:
`--config.only=PART/SCENARIO/POLICY/seedN`.
"""

import ml_collections

from configs import campaign
