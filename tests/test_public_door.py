"""The lazy door of `resilient_moe`: complete, and free until it is used."""

import ast
import subprocess
import sys

import pytest

import resilient_moe as rm

HEAVY = ("jax", "jaxlib", "numpy", "flax", "orbax", "optax", "matplotlib")


def test_importing_the_door_loads_nothing_heavy():
  code = (
    "import sys, resilient_moe, resilient_moe.faults\n"
    f"print([m for m in {HEAVY} if m in sys.modules])"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", rm.__all__)
def test_every_public_name_can_be_had(name):
  assert getattr(rm, name) is not None


def test_type_checkers_see_the_same_names(repository):
  """The imports under TYPE_CHECKING repeat the door for static readers."""
  path = repository / "resilient_moe" / "__init__.py"
  homes = {}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module != "typing":
      homes.update({alias.name: node.module for alias in node.names})
  assert sorted(homes) == rm.__all__ == sorted(rm.__all__)
  for name, home in homes.items():
    expected = rm._ELSEWHERE.get(name, "resilient_moe.recovery")
    assert home == expected, name


def test_every_action_has_its_public_name():
  assert {action.__name__ for action in rm.ACTIONS} <= set(rm.__all__)


def test_an_unknown_name_says_what_there_is():
  with pytest.raises(AttributeError, match=r"'forwrad'; it offers .*forward"):
    _ = rm.forwrad


def test_dir_lists_what_was_not_loaded_yet():
  assert set(rm.__all__) <= set(dir(rm))
