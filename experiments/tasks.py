"""Runs that don't need each other, several at a time."""

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.progress import seconds


class Task(NamedTuple):
  """One run; `turn`: those of a lower one are done before it begins."""

  title: str
  turn: int
  function: Callable[..., str]
  arguments: tuple[object, ...]


def run_tasks(tasks: Sequence[Task], jobs: int) -> None:
  """Runs all tasks, turn by turn; says how far it is and how long it takes."""
  print(f"{len(tasks)} runs to do, {jobs} at a time", flush=True)
  begun, done = time.monotonic(), 0

  def say(task: Task, outcome: str) -> None:
    nonlocal done
    done += 1
    spent_s = time.monotonic() - begun
    left_s = spent_s / done * (len(tasks) - done)
    print(
      f"[{done}/{len(tasks)}] {task.title}: {outcome}; "
      f"{seconds(spent_s)}, about {seconds(left_s)} left",
      flush=True,
    )

  if jobs == 1:
    for task in sorted(tasks, key=lambda t: t.turn):
      say(task, task.function(*task.arguments))
    return
  # No locks or threads of this process go along.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
    try:
      for turn in sorted({task.turn for task in tasks}):
        running = {
          pool.submit(task.function, *task.arguments): task
          for task in tasks
          if task.turn == turn
        }
        for future in concurrent.futures.as_completed(running):
          say(running[future], future.result())
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
