"""Seconds and bytes over links: the busiest end of each link decides.

Bytes of one call flow at once over every link that they need; a device has
its own share of `intra`, `inter` and `host`, a node its own `disk` and
`store`. So a transfer takes its first byte's latency and
`max over links (bytes of the busiest end / rate)`.
"""

from typing import NamedTuple

import numpy as np

from resilient_moe.recovery.view import ClusterView, Tier
from resilient_moe.sim.hardware import Device, Link


class Traffic(NamedTuple):
  """What one link carries in a transfer."""

  link: str  # intra, inter, host, disk, store, memory
  nbytes: int  # all ends together
  busiest_bytes: float  # of the end that carries most
  seconds: float


def seconds(traffic: tuple[Traffic, ...]) -> float:
  """Time of transfers that flow at once."""
  return max((t.seconds for t in traffic), default=0.0)


def _over(
  name: str, link: Link, ends: tuple[np.ndarray, ...], sizes: np.ndarray
) -> tuple[Traffic, ...]:
  """Bytes `sizes` [.] over `link`, at the ends `ends` (each [.] ids)."""
  total = float(sizes.sum())
  if not total:
    return ()
  busiest = max(float(np.bincount(end, sizes).max()) for end in ends)
  took = float(link.latency_s) + busiest / float(link.bytes_per_s)
  return (Traffic(name, round(total), busiest, took),)


def peer(
  view: ClusterView,
  source: np.ndarray,
  to: np.ndarray,
  sizes: np.ndarray,
  device: Device,
) -> tuple[Traffic, ...]:
  """From ranks `source` [.] to ranks `to` [.]: `intra` in a node, else `inter`.

  A device's egress and ingress are counted apart: links go both ways.
  """
  near = view.host[source] == view.host[to]
  found: tuple[Traffic, ...] = ()
  for name, mask in (("intra", near), ("inter", ~near)):
    ends = (source[mask], to[mask])
    found += _over(name, getattr(device, name), ends, sizes[mask])
  return found


def local(
  to: np.ndarray, sizes: np.ndarray, device: Device
) -> tuple[Traffic, ...]:
  """Within a device's memory: read and written once."""
  rate = device.memory_bytes_per_s * device.memory_efficiency / 2
  if not sizes.sum():
    return ()
  busiest = float(np.bincount(to, sizes).max())
  return (Traffic("memory", round(sizes.sum()), busiest, busiest / rate),)


def host(
  to: np.ndarray, sizes: np.ndarray, device: Device
) -> tuple[Traffic, ...]:
  """From memory of the own host, over each device's share of it."""
  return _over("host", device.host, (to,), sizes)


def shared(
  view: ClusterView,
  to: np.ndarray,
  sizes: np.ndarray,
  tier: Tier,
  device: Device,
  item: np.ndarray | None = None,
) -> tuple[Traffic, ...]:
  """From disk or object store: a node's devices share it, then `host`.

  `item` [.]: what each transfer reads; a node reads an item once and keeps it
  in the page cache for its other devices.
  """
  name = tier.value
  node, read = view.host[to], sizes
  if item is not None:
    pair = node.astype(np.int64) * (int(item.max(initial=0)) + 1) + item
    first = np.unique(pair, return_index=True)[1]
    node, read = node[first], sizes[first]
  link = getattr(device, name)
  return _over(name, link, (node,), read) + host(to, sizes, device)


def checkpointed(
  view: ClusterView, to: np.ndarray, sizes: np.ndarray, device: Device
) -> tuple[Traffic, ...]:
  """From one checkpoint store: a node whose NICs all readers share.

  As in Tarragon (arXiv 2601.01310): a node beside the instance, as many NICs
  as it would have devices, direct to device memory. On an instance of one
  node the store is a process of it, and bytes come from host memory.
  """
  if (view.host == view.host[0]).all():
    return host(to, sizes, device)
  nics = float(device.devices_per_node)
  egress = float(sizes.sum()) / nics
  found = _over("inter", device.inter, (to,), sizes)
  if found and egress > found[0].busiest_bytes:
    took = float(device.inter.latency_s)
    took += egress / float(device.inter.bytes_per_s)
    found = (Traffic("inter", found[0].nbytes, egress, took),)
  return found


class Exchange(NamedTuple):
  """One direction of an exchange of one layer."""

  seconds: float
  intra_bytes: float  # of the busiest device
  inter_bytes: float


def scatter(
  view: ClusterView,
  senders: np.ndarray,
  sent: np.ndarray,
  receivers: np.ndarray,
  received: np.ndarray,
  device: Device,
) -> Exchange:
  """All-to-all or point to point: bytes `sent` [D] spread over `receivers`.

  Ranks `senders` [D] send to ranks `receivers` [M], who get `received` [M].
  Which receiver gets whose bytes is taken as independent, so that of a
  sender's bytes the share that leaves its node is that of `received` bytes
  on other nodes; what stays on the device takes no link. `intra` and `inter`
  carry their shares at the same time; each device writes to its peers
  directly (one latency).
  """
  total = float(received.sum())
  if not total or not sent.sum():
    return Exchange(0.0, 0.0, 0.0)
  nodes = int(view.host.max()) + 1
  in_node = np.bincount(view.host[receivers], received, nodes) / total
  from_node = np.bincount(view.host[senders], sent, nodes) / sent.sum()
  own = np.zeros(len(view.host))
  own[receivers] = received / total
  own_sent = np.zeros(len(view.host))
  own_sent[senders] = sent / sent.sum()
  near = np.concatenate(
    [
      sent * (in_node[view.host[senders]] - own[senders]),
      received * (from_node[view.host[receivers]] - own_sent[receivers]),
    ]
  )
  far = np.concatenate(
    [
      sent * (1 - in_node[view.host[senders]]),
      received * (1 - from_node[view.host[receivers]]),
    ]
  )
  return _both(float(near.max()), float(far.max()), device)


def gather(
  view: ClusterView, ranks: np.ndarray, sizes: np.ndarray, device: Device
) -> Exchange:
  """All-gather: every rank of `ranks` [R] gets all others' `sizes` [R].

  A node's devices share what comes from other nodes: each fetches its part
  once and passes it on inside (hierarchical, as NCCL does).
  """
  total = float(sizes.sum())
  nodes = int(view.host.max()) + 1
  held = np.bincount(view.host[ranks], sizes, nodes)
  members = np.bincount(view.host[ranks], minlength=nodes)
  far = (total - held[view.host[ranks]]) / members[view.host[ranks]]
  inside = members[view.host[ranks]] > 1
  near = np.where(inside, total - sizes - far, 0.0)
  return _both(float(near.max()), float(far.max()), device)


def _both(near: float, far: float, device: Device) -> Exchange:
  """Both links at once; one that carries nothing takes no time."""
  took = 0.0
  for nbytes, link in ((near, device.intra), (far, device.inter)):
    if nbytes > 1e-9:
      took = max(took, link.latency_s + nbytes / link.bytes_per_s)
  return Exchange(float(took), near, far)
