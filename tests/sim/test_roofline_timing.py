"""An engine's start is what the cost model says a restart takes."""

import pytest

from resilient_moe.recovery import bare_view, load
from resilient_moe.recovery.start import start
from resilient_moe.sim.cost import Roofline
from resilient_moe.sim.devices import device
from resilient_moe.sim.roofline_timing import RooflineTiming
from resilient_moe.sim.shapes import shape


def test_a_start_from_the_store_does_not_compile():
  hardware = device("h100")
  timing = RooflineTiming(Roofline(hardware, shape("olmoe-1b-7b")), "check")
  view = start(load("mesh_shrink"), bare_view(4, 64))  # nothing is stored
  stored, compiled = (
    sum(seconds for _, seconds in timing.start(view, 1, cache))
    for cache in (True, False)
  )
  saved = hardware.compile_s - hardware.load_executable_s
  assert compiled - stored == pytest.approx(saved)
