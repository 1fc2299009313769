"""The scenarios that only real processes can go through."""

import dataclasses

from resilient_moe.faults.schedule import Fault, Schedule
from resilient_moe.faults.setting import Setting

STUCK_S = 0.8  # until a stuck rank that returns goes on
STORE_GAP_STEPS = 4  # from the store's loss to a rank's


def rank_stuck(setting: Setting) -> Schedule:
  """A rank's process is stopped, and stays so."""
  return (Fault("rank_stuck", (setting.rank,), at_step=setting.at_step),)


def rank_stuck_returns(setting: Setting) -> Schedule:
  """A rank's process is stopped and goes on, perhaps after it was given up."""
  (stuck,) = rank_stuck(setting)
  return (dataclasses.replace(stuck, resume_s=STUCK_S),)


def store_lost(setting: Setting) -> Schedule:
  """The process that holds the KV checkpoints is killed."""
  return (Fault("store_lost", (), at_step=setting.at_step),)


def store_and_rank(setting: Setting) -> Schedule:
  """The store is killed, and a few steps later a rank that relied on it."""
  later = setting.at_step + STORE_GAP_STEPS
  return (
    *store_lost(setting),
    Fault("rank_lost", (setting.rank,), at_step=later),
  )


def supervisor_lost(setting: Setting) -> Schedule:
  """The supervisor is killed; everything ends, to be started again."""
  return (Fault("supervisor_lost", (), at_step=setting.at_step),)
