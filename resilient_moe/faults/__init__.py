"""Faults: what breaks and when, as data; the ground truth of an experiment.

A *fault* is what really happened; a policy sees only the *failure* that a
detector reports (`resilient_moe.recovery`).
"""

from resilient_moe.faults.check import (
  INSIDES,
  KINDS,
  LINK_KINDS,
  PHASES,
  PROCESS_KINDS,
  RANKLESS_KINDS,
)
from resilient_moe.faults.draw import random_schedule
from resilient_moe.faults.injector import Injector
from resilient_moe.faults.named import scenario, scenario_names
from resilient_moe.faults.parse import parse_schedule
from resilient_moe.faults.roles import check_roles
from resilient_moe.faults.scenarios import SCENARIOS, ring_neighbour
from resilient_moe.faults.schedule import (
  Fault,
  Moment,
  Schedule,
  check_ranks,
  due,
)
from resilient_moe.faults.setting import Scenario, SplitScenario
from resilient_moe.faults.split import SPLIT_SCENARIOS

__all__ = [
  "INSIDES",
  "KINDS",
  "LINK_KINDS",
  "PHASES",
  "PROCESS_KINDS",
  "RANKLESS_KINDS",
  "SCENARIOS",
  "SPLIT_SCENARIOS",
  "Fault",
  "Injector",
  "Moment",
  "Scenario",
  "Schedule",
  "SplitScenario",
  "check_ranks",
  "check_roles",
  "due",
  "parse_schedule",
  "random_schedule",
  "ring_neighbour",
  "scenario",
  "scenario_names",
]
