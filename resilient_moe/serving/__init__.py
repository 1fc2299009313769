"""Requests, scheduler and the serve loop, for every backend. No JAX."""

from resilient_moe.serving.backend import Backend as Backend
from resilient_moe.serving.backend import Outcome as Outcome
from resilient_moe.serving.backend import Placed as Placed
from resilient_moe.serving.backend import StepAborted as StepAborted
from resilient_moe.serving.carry import EngineRestart as EngineRestart
from resilient_moe.serving.clock import Clock as Clock
from resilient_moe.serving.loop import serve as serve
from resilient_moe.serving.recover import Unrecoverable as Unrecoverable
from resilient_moe.serving.request import Request as Request
from resilient_moe.serving.scheduler import StepBatch as StepBatch
from resilient_moe.serving.state import SchedulerState as SchedulerState
