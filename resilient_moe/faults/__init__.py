"""Faults: what breaks and when, as data; the ground truth of an experiment.

A *fault* is what really happened; a policy sees only the *failure* that a
detector reports (`resilient_moe.recovery`).
"""

from resilient_moe.faults.draw import random_schedule
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
  PROCESS_KINDS,
  RANKLESS_KINDS,
  Fault,
  Moment,
  Schedule,
  check_ranks,
  due,
)

__all__ = [
  "KINDS",
  "PHASES",
  "PROCESS_KINDS",
  "RANKLESS_KINDS",
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
