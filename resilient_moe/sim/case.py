"""Everything that defines one simulated run, as plain data."""

import dataclasses

from resilient_moe.faults import Fault
from resilient_moe.recovery import RecoveryPolicy
from resilient_moe.serving.request import Request


@dataclasses.dataclass(frozen=True)
class ModelFacts:
  """What a simulation needs to know of a model."""

  vocab_size: int
  n_experts: int
  top_k: int
  moe_layers: int
  expert_bytes: int  # of one expert, all layers
  dense_bytes: int  # of what every rank that attends has
  token_kv_bytes: int  # KV of one position, all layers
  embedding_bytes: int  # of a token between attention and experts, one layer


@dataclasses.dataclass(frozen=True)
class SimulatedCase:
  """One policy, one scenario, one seed; what `runtime.case.Case` is to others.

  Attributes:
    name: of the policy, as it was asked for ("a+b").
    rows: KV rows that a rank needs without any loss.
    max_len: positions that a request may have.
    cache_len: positions that a row has.
    wait_ready: traffic waits until the ready meshes are ready.
    by_step: readiness and checkpoints count steps, and the domains step
      together: a checkpoint has what was committed by the step before, and
      one mesh becomes ready before each step. No seconds decide anything
      then, so that a run can be compared with an emulated one.
  """

  name: str
  policy: RecoveryPolicy
  scenario: str
  seed: int
  deployment: str
  ranks: int
  attention: int
  model: ModelFacts
  rows: int
  chunk: int
  max_len: int
  cache_len: int
  requests: tuple[Request, ...]
  faults: tuple[Fault, ...]
  wait_ready: bool = True
  by_step: bool = False

  @property
  def row_bytes(self) -> int:
    """KV of one row."""
    return self.model.token_kv_bytes * self.cache_len
