"""Faults: what breaks and when, as data; the ground truth of an experiment.

A *fault* is what really happened; a policy sees only the *failure* that a
detector reports (`resilient_moe.recovery`).
"""

from resilient_moe.faults.injector import Injector
from resilient_moe.faults.parse import parse_schedule
from resilient_moe.faults.scenarios import (
  SCENARIOS,
  Scenario,
  ring_neighbour,
  scenario,
)
from resilient_moe.faults.schedule import (
  KINDS,
  PHASES,
  Fault,
  Moment,
  Schedule,
  check_ranks,
  due,
  random_schedule,
)

__all__ = [
  "KINDS",
  "PHASES",
  "SCENARIOS",
  "Fault",
  "Injector",
  "Moment",
  "Scenario",
  "Schedule",
  "check_ranks",
  "due",
  "parse_schedule",
  "random_schedule",
  "ring_neighbour",
  "scenario",
]
