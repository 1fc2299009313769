"""Several store processes: each keeps the KV of some attention workers.

One alone may have too little memory or bandwidth for all. Which store keeps a
rank's KV stays as it is while that store lives: whoever changes it must stream
everything anew.
"""

from collections.abc import Mapping, Sequence

from resilient_moe.runtime.process import kv_store
from resilient_moe.runtime.process.link import Address


class Stores:
  """The stores of a deployment. For one thread, which they end with."""

  def __init__(
    self, n: int, shape: Sequence[int], dtype: str, authkey: bytes,
    delays_s: Mapping[int, float] | None = None,
  ) -> None:  # fmt: skip
    """Starts them.

    Args:
      n: How many.
      shape: One request's KV, [L, 2K, T, d].
      dtype: Of it.
      authkey: Who knows it may stream and pull.
      delays_s: By store, a fault: how slow it is to take a message.

    Raises:
      ConnectionError: one did not start; none is left behind.
    """
    if n < 1:
      raise ValueError(f"n={n}: at least one store is needed")
    delays_s = delays_s or {}
    self._stores: list[kv_store.StoreProcess] = []
    self._store_of: dict[int, int] = {}  # rank -> its store
    self._known_dead: set[int] = set()
    try:
      for i in range(n):
        delay_s = delays_s.get(i, 0.0)
        self._stores.append(
          kv_store.start(shape, dtype, authkey, delay_s=delay_s)
        )
    except BaseException:
      self.close()
      raise

  @property
  def pids(self) -> dict[int, int]:
    """By store, of those that live: another's may be anybody's by now."""
    return {i: self._stores[i].process.pid for i in self.alive()}

  def alive(self) -> tuple[int, ...]:
    return tuple(i for i, store in enumerate(self._stores) if store.alive)

  def addresses(self) -> dict[int, Address]:
    """By store, of those that live: what any of them keeps can be pulled."""
    return {i: self._stores[i].address for i in self.alive()}

  def address_for(self, rank: int) -> Address | None:
    """Where a rank streams to; None: its store is dead, see `retarget`."""
    if rank not in self._store_of:
      return self.retarget(rank)
    store = self._stores[self._store_of[rank]]
    return store.address if store.alive else None

  def retarget(self, rank: int) -> Address | None:
    """The rank's store, another one if that is dead; None: all are.

    Another one knows nothing of the rank's requests: they must be rebased.
    """
    living = self.alive()
    if not living:
      return None
    if self._store_of.get(rank) not in living:
      self._store_of[rank] = living[rank % len(living)]
    return self._stores[self._store_of[rank]].address

  def ranks_of(self, i: int) -> tuple[int, ...]:
    """Whose store is `i`, dead or alive."""
    return tuple(sorted(r for r, store in self._store_of.items() if store == i))

  def lost(self) -> tuple[int, ...]:
    """Stores that died since the last call; what they kept is gone."""
    dead = set(range(len(self._stores))) - set(self.alive())
    new = dead - self._known_dead
    self._known_dead |= new
    return tuple(sorted(new))

  def kill(self, i: int) -> None:
    """A fault: one is gone at once, and `lost` will say so."""
    self._stores[i].close()

  def close(self) -> None:
    """Ends them; what they kept is gone."""
    for store in self._stores:
      store.close()
