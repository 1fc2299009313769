"""Kernels of our own for serving on CPU in float32."""

from resilient_moe.model.native.kernels import attend as attend
from resilient_moe.model.native.kernels import experts as experts
from resilient_moe.model.native.kernels import grouped_matmul as grouped_matmul
from resilient_moe.model.native.kernels import usable as usable
from resilient_moe.model.native.library import register as register
