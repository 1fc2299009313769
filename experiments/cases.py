"""From settings to cases: every run of a comparison, checked beforehand.

Whatever can be known to be wrong before an engine starts is found here, so
that a sweep fails in its first second and not in its last run.
"""

import dataclasses
import hashlib
import inspect
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import resilient_moe
from experiments.settings import BY_SCENARIO, NO_FAULTS, Settings
from experiments.simulated import SimOptions
from resilient_moe.faults import (
  PROCESS_KINDS,
  Fault,
  check_roles,
  parse_schedule,
  scenario,
  scenario_names,
)
from resilient_moe.recovery import load
from resilient_moe.runtime.case import Case
from resilient_moe.runtime.process.cluster import Cluster
from resilient_moe.runtime.process.rules import Limits
from resilient_moe.runtime.split.options import ExchangeOptions
from resilient_moe.serving.request import Request
from resilient_moe.serving.scheduler import refusal
from resilient_moe.serving.workload import (
  PromptSource,
  byte_prompts,
  make_requests,
  random_prompts,
  tokenized_prompts,
)

if TYPE_CHECKING:
  from resilient_moe.model import ModelConfig, StepOptions

TWIN = "none"  # the policy of the fault-free twin
CUSTOM = "custom"  # the scenario of faults that a config lists
_TAKING = ("rank_lost", "rank_leaving", "rank_stuck")
ASSETS = pathlib.Path(resilient_moe.__file__).parent / "assets"


@dataclasses.dataclass(frozen=True)
class Job:
  """A case, and what identifies it: the same record, the same run."""

  case: Case
  record: Mapping[str, Any]  # plain data, for case.json

  @property
  def place(self) -> pathlib.PurePath:
    """Its folder in a work directory."""
    case = self.case
    return pathlib.PurePath(case.scenario, case.policy, f"seed{case.seed}")

  @property
  def twin_place(self) -> pathlib.PurePath:
    """The folder of its fault-free twin, unless all of a seed share one."""
    return self.place.parent.parent / TWIN / self.place.name

  @property
  def digest(self) -> str:
    """A hash of the record."""
    return _digest(self.record)


def jobs(settings: Settings) -> list[Job]:
  """Every run, for each scenario and seed the twin first (or once a seed).

  Raises:
    ValueError: for the first thing that can't work.
  """
  folder = _checkpoint_folder(settings.checkpoint)
  options = _options(settings)
  model, model_crc = _model(settings, folder)
  _check_policies(settings)
  _check_workloads(settings)
  _check_processes(settings)
  prompts = _prompts(folder, model)
  found = []
  for name, policies in _policies(settings).items():
    for seed in settings.seeds:
      faults = _faults(settings, name, seed)
      requests = _requests(settings, name, seed, prompts)
      _check_fit(requests, options, model)
      for policy in policies:
        case = Case(
          checkpoint=str(folder),
          dtype=settings.dtype,
          policy=policy,
          policy_kwargs=_kwargs(settings, policy),
          scenario=name,
          seed=seed,
          runtime=settings.runtime,
          deployment=settings.deployment,
          ranks=settings.ranks,
          attention=_attention(settings),
          exchange=settings.exchange,
          options=settings.options,
          requests=requests,
          faults=() if policy == TWIN else faults,
          wait_ready=settings.wait_ready,
          detector=settings.detector,
          cluster=settings.cluster,
          sim=settings.sim,
        )
        found.append(Job(case, _record(case, f"{model_crc:08x}")))
  return _chosen(settings, found) if settings.only else found


def _record(case: Case, model_crc: str) -> dict[str, Any]:
  """The case as plain data; where the model lies doesn't matter, what it is.

  The requests, which are long and in the history, are there by their hash.
  """
  record = dataclasses.asdict(case)
  # Younger than the runs that lie in many a work directory.
  added = {"attention": 0, "exchange": {}, "sim": {}, "dtype": ""}
  for field, default in added.items():
    if record[field] == default:
      del record[field]
  for fault in record["faults"]:
    for young in ("delay_s", "inside"):
      if fault[young] is None:
        del fault[young]
  record["checkpoint"] = model_crc
  record["requests"] = _digest(record["requests"])
  plain: dict[str, Any] = json.loads(json.dumps(record))
  return plain


def _digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checkpoint_folder(name: str) -> pathlib.Path:
  shipped = ASSETS / name
  return shipped if shipped.is_dir() else pathlib.Path(name).absolute()


def _model(
  settings: Settings, folder: pathlib.Path
) -> tuple["ModelConfig", int]:
  """The model's config and its CRC, if the checkpoint is whole."""
  # Loads JAX (and starts no device), which nothing else in a launcher does.
  from resilient_moe.runtime.checkpoints import check_checkpoint

  try:
    return check_checkpoint(folder, settings.dtype)
  except (OSError, ValueError, TypeError) as error:
    ships = ", ".join(sorted(p.name for p in ASSETS.glob("*/")))
    raise ValueError(
      f"config.checkpoint={settings.checkpoint!r}: {error}; needed is a folder "
      f"that save_checkpoint wrote, a published one, or one that ships: {ships}"
    ) from error


def _options(settings: Settings) -> "StepOptions":
  from resilient_moe.model import StepOptions

  known = [field.name for field in dataclasses.fields(StepOptions)]
  for name in settings.options:
    if name not in known:
      raise ValueError(
        f"config.options.{name}: unknown option; choices: {', '.join(known)}"
      )
  try:
    return StepOptions(**settings.options)
  except (TypeError, ValueError) as error:
    raise ValueError(f"config.options: {error}") from error


def _prompts(folder: pathlib.Path, model: "ModelConfig") -> PromptSource:
  """Bytes for our own models, else tokens as the checkpoint has them."""
  from third_party import huggingface

  if not huggingface.is_checkpoint(folder):
    return byte_prompts
  if huggingface.has_tokenizer(folder):
    return tokenized_prompts(huggingface.Tokenizer(folder).encode)
  return random_prompts(model.vocab_size)


def _requests(
  settings: Settings, name: str, seed: int, prompts: PromptSource
) -> tuple[Request, ...]:
  """The requests of a scenario."""
  workload = {**settings.workload, **settings.workloads.get(name, {})}
  try:
    requests = make_requests(
      **{**workload, "seed": seed, "prompts": prompts}
    )
  except (TypeError, ValueError) as error:
    known = inspect.signature(make_requests).parameters
    choices = ", ".join(name for name in known if name != "prompts")
    raise ValueError(
      f"config.workload: {error}; arguments: {choices}"
    ) from error
  if not requests:
    raise ValueError("config.workload.count=0: at least 1")
  return requests


def _check_fit(
  requests: Iterable[Request], options: "StepOptions", model: "ModelConfig"
) -> None:
  """Every request can be accepted by an engine of this shape."""
  for request in requests:
    reason = refusal(request, options.max_len, model.vocab_size)
    if reason:
      raise ValueError(
        f"request {request.request_id}: {reason}; raise config.options.max_len"
        " or lower config.workload.prompt_tokens or new_tokens"
      )


def _kwargs(settings: Settings, policy: str) -> Mapping[str, Any]:
  """Those of the policy, or of its first part where it is "a+b"."""
  given = settings.policy_kwargs
  return given.get(policy, given.get(policy.partition("+")[0], {}))


def _check_workloads(settings: Settings) -> None:
  for name in settings.workloads:
    known = scenario_names(_attention(settings))
    if name not in known:
      raise ValueError(
        f"config.workloads.{name}: unknown scenario; choices: "
        f"{', '.join(known)}"
      )


def _check_processes(settings: Settings) -> None:
  """What the runtimes are told: about workers, links, and time."""
  for key, kind in (
    ("detector", Limits), ("cluster", Cluster), ("exchange", ExchangeOptions),
    ("sim", SimOptions),
  ):  # fmt: skip
    given = getattr(settings, key)
    known = [field.name for field in dataclasses.fields(kind)]
    for name in given:
      if name not in known:
        raise ValueError(
          f"config.{key}.{name}: unknown key; choices: {', '.join(known)}"
        )
    try:
      made = kind(**given)
      if isinstance(made, SimOptions) and settings.runtime == "simulated":
        made.timing()
    except (TypeError, ValueError) as error:
      raise ValueError(f"config.{key}: {error}") from error


def _attention(settings: Settings) -> int:
  """How many of the ranks do attention only; 0: all do everything."""
  if settings.deployment != "disaggregated":
    if settings.attention:
      raise ValueError(
        f"config.attention={settings.attention} with config.deployment="
        f"{settings.deployment}: choices: 0, or deployment=disaggregated"
      )
    return 0
  attention = settings.attention or max(1, settings.ranks // 3)
  if attention >= settings.ranks:
    raise ValueError(
      f"config.attention={attention} of {settings.ranks} ranks: at most "
      f"{settings.ranks - 1}, the others hold the experts"
    )
  return attention


def _check_policies(settings: Settings) -> None:
  """Every policy can be made, those that only have arguments too."""
  for name in dict.fromkeys((*settings.policies, *settings.policy_kwargs)):
    first, *rest = name.split("+")
    load(first, **_kwargs(settings, name))
    for other in rest:
      load(other)


def _scenarios(settings: Settings) -> tuple[str, ...]:
  """Names of the folders: what breaks."""
  if settings.faults == BY_SCENARIO:
    return settings.scenarios
  return (TWIN,) if settings.faults == NO_FAULTS else (CUSTOM,)


def _policies(settings: Settings) -> dict[str, tuple[str, ...]]:
  """By scenario, the policies that go through it, the twin first."""
  asked = _scenarios(settings)
  everybody = tuple(dict.fromkeys((TWIN, *settings.policies)))
  found = dict.fromkeys(asked, everybody)
  if settings.shared_twin:
    rest = tuple(policy for policy in everybody if policy != TWIN)
    found = {TWIN: (TWIN,)} | dict.fromkeys(asked, rest)
    # Other requests, another twin.
    found |= {name: everybody for name in settings.workloads if name in asked}
    if TWIN in asked:
      found[TWIN] = everybody
  for pair in settings.leave_out:
    name, _, policy = pair.partition("/")
    if policy == TWIN or policy not in found.get(name, ()):
      raise ValueError(
        f"config.leave_out={pair!r} leaves nothing out; scenarios:"
        f" {', '.join(asked)}; policies: {', '.join(settings.policies)}"
      )
    found[name] = tuple(each for each in found[name] if each != policy)
  return found


def _chosen(settings: Settings, found: Iterable[Job]) -> list[Job]:
  """The only case that is asked for, after its twin."""
  by_place = {str(job.place): job for job in found}
  if settings.only not in by_place:
    raise ValueError(
      f"config.only={settings.only!r} is no case of this config; scenarios:"
      f" {', '.join(_scenarios(settings))}; policies:"
      f" {', '.join((TWIN, *settings.policies))}; seeds:"
      f" {', '.join(map(str, settings.seeds))}"
    )
  job = by_place[settings.only]
  twin = by_place.get(str(job.twin_place)) or by_place[str(shared_twin(job))]
  return [twin] if twin is job else [twin, job]


def shared_twin(job: Job) -> pathlib.PurePath:
  """The folder of the twin that all cases of a seed share."""
  return pathlib.PurePath(TWIN, TWIN, job.place.name)


def _faults(settings: Settings, name: str, seed: int) -> tuple[Fault, ...]:
  """What breaks, and that somebody survives it."""
  if name == TWIN:
    return ()
  ranks = settings.ranks
  if isinstance(settings.faults, str):
    faults = scenario(
      name,
      ranks,
      seed,
      at_step=settings.fault_step,
      rank=None if settings.fault_rank < 0 else settings.fault_rank,
      after_ready=settings.fault_after_ready,
      attention=_attention(settings),
    )
  else:
    faults = parse_schedule(settings.faults, ranks)
  check_roles(faults, _attention(settings), ranks)
  for fault in faults:
    if fault.kind in PROCESS_KINDS and settings.runtime != "process":
      raise ValueError(
        f"scenario {name!r}: a fault {fault.kind!r} needs real processes, and"
        f" the runtime is {settings.runtime!r}; give config.runtime=process"
      )
    if fault.kind in _TAKING and len(fault.ranks) >= ranks:
      raise ValueError(
        f"scenario {name!r} takes {len(fault.ranks)} of {ranks} ranks at once;"
        f" at most {ranks - 1} can be survived"
      )
  return faults
