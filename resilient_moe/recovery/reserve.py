"""What a policy keeps standing, in bytes: the price of its redundancy."""

from typing import NamedTuple

from resilient_moe.recovery.view import ClusterView, Role, Status


class Memory(NamedTuple):
  """What an instance holds beside experts and rows."""

  present: int  # ranks that hold arrays
  dense_bytes: int  # of one rank
  host_bytes: int  # experts in host memory, of all
  checkpoint_bytes: int  # reserved for copies of KV, of all


def reserve_bytes(
  view: ClusterView, memory: Memory, base_rows: int, row_bytes: int
) -> int:
  """Memory beyond the same instance's without recovery.

  Copies and empty slots of experts, spare KV rows, spare ranks' dense
  weights, KV mirrors, and experts kept in host memory.

  Args:
    view: the instance as it opens.
    memory: what it holds.
    base_rows: rows a rank needs without any loss.
    row_bytes: of one request's KV.
  """
  first = view.home[list(view.launched)]
  attend = memory.present - int((first == Role.EXPERT).sum())
  hold = memory.present - int((first == Role.ATTENTION).sum())
  slots = hold * view.slots_per_rank - view.n_experts
  rows = attend * view.rows_per_rank
  rows -= base_rows * int((first != Role.EXPERT).sum())
  spares = int((view.status == Status.SPARE).sum())
  total = slots * view.expert_bytes + rows * row_bytes
  total += spares * memory.dense_bytes
  total += memory.host_bytes + memory.checkpoint_bytes
  return max(total, 0)
