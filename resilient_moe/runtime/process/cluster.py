"""Where the workers of an engine live, and who starts them."""

import dataclasses

PLATFORMS = ("cpu", "cuda", "tpu")

# JAX's documented switches for collectives that end when a peer is dead, in
# place of shutting gloo's sockets (docs: fault-tolerant distributed JAX).
# Written from the documentation; no GPU was at hand to run them on.
CUDA_ENVIRONMENT = {
  "XLA_PYTHON_CLIENT_ABORT_COLLECTIVES_ON_FAILURE": "1",
  "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT": "1",
  "XLA_FLAGS": (
    "--xla_gpu_nccl_terminate_on_error=false "
    "--xla_gpu_nccl_async_execution=true "
    "--xla_gpu_nccl_blocking_communicators=false"
  ),
}


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The workers' side of a case.

  Attributes:
    listen: HOST:PORT where the supervisor takes workers; port 0: any.
    spawn: it starts them itself, on this host; else somebody else does, and
      they dial in (`worker rank=auto`), replacements too.
    platform: what their devices are.
  """

  listen: str = "127.0.0.1:0"
  spawn: bool = True
  platform: str = "cpu"

  def __post_init__(self) -> None:
    if self.platform not in PLATFORMS:
      raise ValueError(
        f"cluster.platform={self.platform!r}: choose one of "
        f"{', '.join(PLATFORMS)}"
      )
    host, colon, port = self.listen.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
      raise ValueError(
        f"cluster.listen={self.listen!r}: needed is HOST:PORT, such as "
        "10.0.0.1:8476"
      )
    if not self.spawn and int(port) == 0:
      raise ValueError(
        f"cluster.listen={self.listen!r}: workers that are started elsewhere "
        "must know the port; 0 means any"
      )

  @property
  def host(self) -> str:
    return self.listen.rpartition(":")[0]

  @property
  def port(self) -> int:
    return int(self.listen.rpartition(":")[2])

  def environment(self) -> dict[str, str]:
    """Variables of a worker's process, before it imports JAX."""
    platform = {"JAX_PLATFORMS": self.platform}
    return platform | (CUDA_ENVIRONMENT if self.platform == "cuda" else {})
