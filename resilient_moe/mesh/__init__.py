"""Meshes of devices and the executables that run on them."""

from resilient_moe.mesh.executables import Executables as Executables
from resilient_moe.mesh.executables import Source as Source
from resilient_moe.mesh.programs import InstanceShape as InstanceShape
from resilient_moe.mesh.programs import make_mesh as make_mesh
