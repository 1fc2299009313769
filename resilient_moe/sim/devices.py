"""The devices by name. Every number says where it is from.

Bandwidths are bytes a second, one direction. Vendors quote NVLink, ICI and UB
as the sum of both; half of that is here. Peaks are dense (no sparsity).
"""

from resilient_moe.sim.hardware import Device, Figure, Link, assumed

_GPU = "NVIDIA {} data sheet"
_CX7 = "ConnectX-7, 400 Gb/s a GPU (DeepEP docs/legacy.md: ~50 GB/s maximum)"
_TPU = "docs.cloud.google.com/tpu/docs/{}"
_CM384 = "CloudMatrix384 (arXiv 2506.12708, section 3), a die"
_REVIVE = "ReviveMoE (arXiv 2602.21140)"

# What all share until somebody measures: small beside the stages below.
_SMALL = {
  "warm_s": assumed(2e-3, "a look-up and a barrier"),
  "table_s": assumed(2e-3, "a few KB to every device, then a barrier"),
  "fence_s": assumed(1e-3, "one message to every survivor"),
  "role_s": assumed(5e-2, "drops caches and frees memory"),
  "requeue_s": assumed(1e-4, "host bookkeeping"),
  "copy_latency_s": assumed(1e-3, "one message to begin it"),
}
_SHARE = {
  "memory_efficiency": assumed(
    0.75, "kernels that stream weights get 70 to 90% of peak bandwidth"
  ),
  "compute_efficiency": assumed(
    0.6, "large matrix products get 50 to 75% of peak on these parts"
  ),
}
_NVME = Link(
  assumed(1e-4, "one NVMe read"),
  assumed(10e9, "a few data-centre NVMe drives of 3 to 7 GB/s a node"),
)
_OBJECTS = Link(
  assumed(5e-2, "first byte of an object store"),
  assumed(3e9, "25 Gb/s of the front-end network a node"),
)
# An engine's stages on GPUs: no vendor states them.
_ENGINE = {
  "process_start_s": Figure(
    18.5, "Tarragon (arXiv 2601.01310), worker init T_w on H200 nodes"
  ),
  "compile_s": assumed(
    60.0, "torch.compile and graph capture of a large MoE take 1 to 3 minutes"
  ),
  "load_executable_s": assumed(
    6.0, f"as the cached graph compile of {_REVIVE}, another stack"
  ),
  "mesh_s": Figure(
    0.7, "EEP (arXiv 2605.10670), metadata stage, mean of its five cases"
  ),
  "layer_s": assumed(1e-5, "a handful of kernels in a captured graph"),
}


def _gpu(
  name: str, memory: float, bandwidth: float, bf16: float, fp8: float,
  fp32: float, nvlink: float, pcie: float,
) -> Device:  # fmt: skip
  sheet = _GPU.format(name)
  return Device(
    name=name.lower(),
    memory_bytes=Figure(memory, sheet),
    memory_bytes_per_s=Figure(bandwidth, sheet),
    flops_per_s={
      "bf16": Figure(bf16, f"{sheet}, dense"),
      "fp8": Figure(fp8, f"{sheet}, dense"),
      "fp32": Figure(fp32, sheet),
    },
    devices_per_node=Figure(8, f"HGX {name}, 8 GPUs"),
    intra=Link(
      assumed(5e-6, "a one-sided NVLink write and its flag"),
      Figure(nvlink / 2, f"{sheet}, NVLink, half of both directions"),
    ),
    inter=Link(
      assumed(1e-5, "a GPU-initiated RDMA write and its flag"),
      Figure(50e9, _CX7),
    ),
    host=Link(
      assumed(1e-5, "one DMA"),
      Figure(pcie, f"{sheet}, PCIe x16, half of both directions"),
    ),
    disk=_NVME,
    store=_OBJECTS,
    **_SMALL,
    **_SHARE,
    **_ENGINE,
  )


def _tpu(
  name: str, memory: float, bandwidth: float, bf16: float, per_node: int,
  ici: float,
) -> Device:  # fmt: skip
  page = _TPU.format(name.removeprefix("tpu-"))
  return Device(
    name=name,
    memory_bytes=Figure(memory, page),
    memory_bytes_per_s=Figure(bandwidth, page),
    flops_per_s={
      "bf16": Figure(bf16, page),
      "fp32": assumed(bf16 / 6, "fp32 products are emulated in 6 bf16 passes"),
    },
    devices_per_node=Figure(per_node, page),
    intra=Link(
      assumed(1e-6, "one ICI hop"),
      Figure(ici / 2, f"{page}, ICI of a chip, half of both directions"),
    ),
    inter=Link(
      assumed(2e-6, "a few ICI hops inside a slice"),
      Figure(ici / 2, f"{page}, ICI joins the hosts of a slice too"),
    ),
    host=Link(
      assumed(1e-5, "one DMA"),
      assumed(16e9, "a chip's share of the host's PCIe"),
    ),
    disk=_NVME,
    store=_OBJECTS,
    **_SMALL,
    **_SHARE,
    process_start_s=assumed(20.0, "libtpu start and import, tens of seconds"),
    compile_s=assumed(60.0, "XLA compiles a large MoE in minutes"),
    load_executable_s=assumed(5.0, "JAX compilation cache"),
    mesh_s=assumed(1.0, "distributed set-up of the survivors"),
    layer_s=assumed(5e-6, "one program a step, no launches in it"),
  )


_ASCEND = Device(
  name="ascend-910c",
  memory_bytes=Figure(64e9, f"{_CM384}: 128 GB a package of two dies"),
  memory_bytes_per_s=Figure(1.6e12, f"{_CM384}: 3.2 TB/s a package"),
  flops_per_s={
    "bf16": Figure(376e12, f"{_CM384}: 752 TFLOPS a package"),
    "fp8": Figure(752e12, f"{_CM384}: int8, as this part has no fp8"),
    "fp32": assumed(94e12, "a quarter of bf16"),
  },
  devices_per_node=Figure(16, "8 packages of 2 dies (docs.sglang.io, Ascend)"),
  intra=Link(
    assumed(2e-6, "one UB hop"),
    Figure(196e9, f"{_CM384}: UB 392 GB/s a package, one way"),
  ),
  inter=Link(
    assumed(3e-6, "two tiers of UB switches, not blocking"),
    Figure(196e9, f"{_CM384}: UB joins all nodes of the supernode alike"),
  ),
  host=Link(
    assumed(1e-5, "one DMA"),
    assumed(16e9, "a die's share of the host's memory bus"),
  ),
  disk=_NVME,
  store=_OBJECTS,
  **_SMALL,
  **_SHARE,
  process_start_s=Figure(10.0, f"{_REVIVE}: engine and executors, '10+ s'"),
  compile_s=Figure(774.0, f"{_REVIVE}: full graph compile, 12.9 min"),
  load_executable_s=Figure(6.0, f"{_REVIVE}: cached compile, disaggregated"),
  mesh_s=Figure(4.2, f"{_REVIVE}: attention failure 10.2 s less compile 6 s"),
  layer_s=assumed(2e-5, "launches of a compiled graph"),
)

# Before it is measured: for relations in tests, not for results.
_CPU = Device(
  name="this-machine",
  memory_bytes=assumed(4e9, "a share of host memory"),
  memory_bytes_per_s=assumed(10e9, "one DDR channel a core"),
  flops_per_s={
    "fp32": assumed(5e10, "one core with vectors of 8"),
    "bf16": assumed(5e10, "computed in fp32"),
  },
  devices_per_node=assumed(8, "virtual devices of one process"),
  intra=Link(assumed(5e-5, "a copy in memory"), assumed(2e9, "memcpy, 2 ways")),
  inter=Link(assumed(1e-4, "loopback"), assumed(1e9, "loopback sockets")),
  host=Link(assumed(1e-5, "a copy in memory"), assumed(4e9, "memcpy")),
  disk=Link(assumed(1e-4, "one read"), assumed(5e8, "a virtual disk")),
  store=Link(assumed(1e-3, "loopback"), assumed(5e8, "a store process")),
  **_SMALL,
  **_SHARE,
  process_start_s=assumed(3.0, "a Python process that imports jax"),
  compile_s=assumed(8.0, "every program of a mesh of the shipped model"),
  load_executable_s=assumed(0.2, "the same from the compilation cache"),
  mesh_s=assumed(5e-3, "one process"),
  layer_s=assumed(1e-3, "XLA on CPU, 8 virtual devices on 2 cores"),
)

_DEVICES = (
  _gpu("H100", 80e9, 3.35e12, 989e12, 1_979e12, 67e12, 900e9, 64e9),
  _gpu("H200", 141e9, 4.8e12, 989e12, 1_979e12, 67e12, 900e9, 64e9),
  _gpu("B200", 180e9, 8e12, 2_250e12, 4_500e12, 80e12, 1.8e12, 64e9),
  _tpu("tpu-v5e", 16e9, 819e9, 197e12, 8, 400e9),
  _tpu("tpu-v5p", 95e9, 2_765e9, 459e12, 4, 1.2e12),
  _tpu("tpu-v6e", 32e9, 1_638e9, 918e12, 8, 800e9),
  _ASCEND,
  _CPU,
)
DEVICES: dict[str, Device] = {device.name: device for device in _DEVICES}


def device(name: str) -> Device:
  """The device `name`.

  Raises:
    ValueError: unknown; names the choices.
  """
  if name not in DEVICES:
    raise ValueError(f"unknown device {name!r}; choices: {', '.join(DEVICES)}")
  return DEVICES[name]


def sources(name: str) -> list[tuple[str, float, str]]:
  """(number, value, source) of the device `name`, in order."""
  return [(n, float(f), f.source) for n, f in device(name).figures()]

