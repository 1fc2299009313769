"""C and C++ that is compiled on its first use; without JAX."""

from resilient_moe.compiled.once import compiled_once as compiled_once
