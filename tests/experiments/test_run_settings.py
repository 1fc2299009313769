"""A config is read with its commas, and refused with a clear sentence."""

import ml_collections
import pytest

from experiments import settings
from tests.experiments.run_fake import tiny


def _read(tmp_path, **changes):
  return settings.read(tiny(tmp_path, **changes))


@pytest.mark.parametrize("key", ["policies", "scenarios"])
@pytest.mark.parametrize(
  ("given", "read"),
  [
    ("a", ("a",)),
    ("a,b", ("a", "b")),
    (" a , b+c", ("a", "b+c")),
    (("a", "b"), ("a", "b")),
    (["a"], ("a",)),
  ],
)
def test_names_come_with_commas_as_lists_or_alone(tmp_path, key, given, read):
  assert getattr(_read(tmp_path, **{key: given}), key) == read


@pytest.mark.parametrize("given", ["0,1,2", (0, 1, 2), [0, 1, 2], "0, 1,2"])
def test_seeds_come_with_commas_or_as_lists(tmp_path, given):
  assert _read(tmp_path, seeds=given).seeds == (0, 1, 2)


def test_one_seed_may_stand_alone(tmp_path):
  assert _read(tmp_path, seeds=7).seeds == _read(tmp_path, seeds="7").seeds


def test_faults_may_be_listed_on_the_command_line(tmp_path):
  fault = {"kind": "rank_lost", "ranks": [3], "at_step": 20}
  assert _read(tmp_path, faults=str([fault])).faults == [fault]
  assert _read(tmp_path, faults=[fault]).faults == [fault]


def test_policy_arguments_are_by_policy_dots_and_all(tmp_path):
  nested = {"kv_restore": {"checkpoint": "host"}, "a": {"b": {"x": [1, 2]}}}
  assert _read(tmp_path, policy_kwargs=nested).policy_kwargs == {
    "kv_restore": {"checkpoint": "host"},
    "a.b": {"x": (1, 2)},
  }


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"nonsense": 1}, "config.nonsense: unknown key; choices: attention, che"),
    ({"parts": {"a": {}}}, "config.parts: only experiments.campaign has parts"),
    ({"attention": -1}, "config.attention=-1: needed is an integer from 0"),
    ({"exchange": 3}, "config.exchange=3: needed are names with values"),
    ({"ranks": 0}, "config.ranks=0: needed is an integer from 1"),
    ({"ranks": "four"}, "config.ranks='four': needed is an integer"),
    ({"ranks": True}, "config.ranks=True"),
    ({"fault_rank": -2}, "config.fault_rank=-2: .* integer from -1"),
    ({"wait_ready": 1}, "config.wait_ready=1: choices: True, False"),
    ({"policies": ""}, "config.policies='': needed is one or more"),
    ({"policies": "a,,b"}, "config.policies='a,,b'"),
    ({"policies": "a,b,a"}, "'a' is there twice"),
    ({"policies": 3}, "config.policies=3: needed is a text"),
    ({"seeds": "0,x"}, "config.seeds='0,x': 'x' is not a seed"),
    ({"seeds": "1,01"}, "1 is there twice"),
    ({"seeds": (-1,)}, "-1 is not a seed"),
    ({"seeds": (0.5,)}, "0.5 is not a seed"),
    ({"faults": "some"}, "config.faults='some': choices: scenario, none"),
    ({"faults": "[{"}, "choices: scenario, none or a list"),
    ({"faults": ()}, "choices: scenario, none or a list"),
    ({"options": 3}, "config.options=3: needed are names with values"),
    ({"slo": {"ttft": 1}}, "config.slo.ttft: unknown .*ttft_slo_s, tbt_slo_s"),
    ({"slo": {"tbt_slo_s": 0}}, "config.slo.tbt_slo_s=0: needed are seconds"),
    ({"policy_kwargs": {"x": 1}}, "config.policy_kwargs.POLICY.ARGUMENT=VALUE"),
  ],
)
def test_what_is_wrong_is_named_with_the_choices(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _read(tmp_path, **changes)


def test_what_is_missing_is_named():
  with pytest.raises(ValueError, match=r"config\.checkpoint is missing"):
    settings.read(ml_collections.ConfigDict())
