"""The shape of the project (DESIGN, Structure), enforced.

Each rule is a function from source text to findings; the first tests run the
rules over the tree, the last ones show that each rule finds what it is for.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOPS = (
  "resilient_moe",
  "policies",
  "configs",
  "experiments",
  "third_party",
  "tests",
)
DOOR = "door"  # resilient_moe/__init__.py itself
CORE = {"recovery", "serving", "report", "faults"}
ALL = CORE | {"datapath", "model", "mesh", "runtime", "sim"}
ALL |= {"policies", "configs"}

# Who may import whom. The order among the first four keeps them free of cycles.
ARROWS: dict[str, set[str]] = {
  "recovery": set(),
  "faults": {"recovery"},
  "report": {"recovery"},
  "serving": {"recovery", "faults", "report"},
  "datapath": {"recovery"},
  "compiled": set(),
  "model": {"compiled"},
  "mesh": {"model", "recovery"},
  # Engines read published checkpoints where they lie, on every worker.
  "runtime": CORE | {"compiled", "datapath", "model", "mesh", "third_party"},
  "sim": set(CORE),
  "policies": CORE - {"faults"} | {DOOR},
  "configs": set(),
  "third_party": {"model"},
  "experiments": ALL | {"third_party", DOOR},
  "tests": ALL | {"third_party", "experiments", DOOR},
  DOOR: ALL - {"policies", "configs"} | {"third_party"},
}
NO_JAX = (
  "recovery", "serving", "report", "sim", "policies", "faults", "datapath",
  "compiled",
)  # fmt: skip
JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex", "torch", "tensorflow"}
MAX_LINES = 400


def _files(*tops: str) -> list[pathlib.Path]:
  return sorted(p for top in tops for p in (ROOT / top).rglob("*.py"))


def _name(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


FILES = [_name(path) for path in _files(*TOPS)]


def component(module: str) -> str:
  """The part of the project that a dotted module name belongs to."""
  first, _, rest = module.partition(".")
  if first != "resilient_moe":
    return first
  return rest.partition(".")[0] or DOOR


def file_component(name: str) -> str:
  """The part of the project that a file belongs to."""
  if name == "resilient_moe/__init__.py":
    return DOOR
  return component(name.removesuffix(".py").replace("/", "."))


def imports(source: str) -> set[str]:
  """Every module that a file imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      if node.level:
        found.add("." * node.level)
      elif node.module == "resilient_moe":
        # `from resilient_moe import faults` is an import of the package, if
        # it is one; the version is free for all.
        names = {alias.name for alias in node.names} - {"__version__"}
        parts = {name for name in names if (ROOT / node.module / name).is_dir()}
        found |= {f"{node.module}.{name}" for name in parts}
        found |= {node.module} if names - parts else set()
      else:
        found.add(str(node.module))
  return found


def arrow_findings(name: str, source: str) -> list[str]:
  """Imports that go against the arrows."""
  own = file_component(name)
  if own not in ARROWS:
    return [f"{own} is not in ARROWS: add it with what it may import"]
  findings = []
  for module in sorted(imports(source)):
    if module.startswith("."):
      findings.append("relative import")
    elif module.partition(".")[0] in TOPS:
      other = component(module)
      if other != own and other not in ARROWS[own]:
        findings.append(f"{own} may not import {module}")
  return findings


def jax_findings(name: str, source: str) -> list[str]:
  """Imports of JAX, or of what loads it, in a host-only package."""
  if file_component(name) not in NO_JAX:
    return []
  return sorted(m for m in imports(source) if m.partition(".")[0] in JAX)


def swallow_findings(source: str) -> list[str]:
  """Broad handlers that neither raise again nor use the exception."""
  findings = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
      inside = [n for statement in node.body for n in ast.walk(statement)]
      raises = any(isinstance(n, ast.Raise) for n in inside)
      uses = any(isinstance(n, ast.Name) and n.id == node.name for n in inside)
      if not (raises or uses):
        findings.append(f"line {node.lineno}: swallows every exception")
    elif (
      isinstance(node, ast.Call)
      and ast.unparse(node.func).endswith("suppress")
      and any(_is_broad(argument) for argument in node.args)
    ):
      findings.append(f"line {node.lineno}: suppresses every exception")
  return findings


def _is_broad(caught: ast.expr | None) -> bool:
  if isinstance(caught, ast.Tuple):
    return any(_is_broad(item) for item in caught.elts)
  return caught is None or ast.unparse(caught) in ("Exception", "BaseException")


def door_findings(source: str) -> list[str]:
  """A door has a docstring, imports, and names; no logic."""
  tree = ast.parse(source)
  findings = [] if ast.get_docstring(tree) else ["no docstring"]
  for node in tree.body[1:]:
    if not isinstance(node, ast.Import | ast.ImportFrom | ast.Assign):
      findings.append(f"line {node.lineno}: more than imports")
  return findings


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_arrows(name):
  assert arrow_findings(name, (ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", FILES)
def test_host_only_packages_do_not_import_jax(name):
  assert jax_findings(name, (ROOT / name).read_text()) == []


def test_host_only_packages_do_not_load_jax_indirectly():
  folders = [
    top if top == "policies" else f"resilient_moe/{top}" for top in NO_JAX
  ]
  modules = [
    _name(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for path in _files(*folders)
  ]
  code = (
    "import importlib, sys\n"
    f"for name in {modules!r}:\n"
    "  importlib.import_module(name)\n"
    f"  heavy = {sorted(JAX)!r}\n"
    "  heavy = [m for m in heavy if m in sys.modules]\n"
    "  if heavy: sys.exit(f'{name} loads {heavy}')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_files_stay_readable(name):
  assert len((ROOT / name).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", FILES)
def test_no_exception_is_swallowed(name):
  assert swallow_findings((ROOT / name).read_text()) == []


def test_every_package_has_a_door():
  folders = {path.parent for path in _files("resilient_moe", "third_party")}
  for folder in sorted(folders):
    door = folder / "__init__.py"
    assert door.is_file(), f"{_name(folder)} has no __init__.py"
    # These two are lazy: a door that imports would bring JAX to everybody.
    if folder not in (ROOT / "resilient_moe", ROOT / "resilient_moe/runtime"):
      assert door_findings(door.read_text()) == [], _name(door)


def test_the_arrows_hold_no_cycle():
  left = {part: set(targets) for part, targets in ARROWS.items()}
  left[DOOR] = set()  # lazy, so it closes no circle
  while left:
    free = {part for part, targets in left.items() if not targets & set(left)}
    assert free, f"cycle among {sorted(left)}"
    left = {part: left[part] for part in left if part not in free}


@pytest.mark.parametrize(
  ("name", "source"),
  [
    ("resilient_moe/recovery/x.py", "import resilient_moe.serving"),
    ("resilient_moe/recovery/x.py", "from resilient_moe import serving"),
    ("resilient_moe/recovery/x.py", "from resilient_moe import Plan"),
    ("resilient_moe/recovery/x.py", "from . import view"),
    ("resilient_moe/sim/x.py", "def f():\n  import resilient_moe.runtime.x"),
    ("resilient_moe/model/x.py", "from resilient_moe.runtime import y"),
    ("policies/x.py", "from resilient_moe.model import ModelConfig"),
    ("third_party/a/x.py", "from experiments import run"),
    ("resilient_moe/new/x.py", ""),
  ],
)
def test_the_arrow_rule_finds(name, source):
  assert len(arrow_findings(name, source)) == 1


@pytest.mark.parametrize(
  "source",
  ["import jax", "from jax import numpy", "def f():\n  import flax.struct"],
)
def test_the_jax_rule_finds(source):
  assert len(jax_findings("resilient_moe/sim/x.py", source)) == 1
  assert jax_findings("resilient_moe/model/x.py", source) == []


@pytest.mark.parametrize(
  ("source", "count"),
  [
    ("try: f()\nexcept: pass", 1),
    ("try: f()\nexcept Exception: x = None", 1),
    ("try: f()\nexcept (OSError, BaseException) as e: pass", 1),
    ("import contextlib\nwith contextlib.suppress(Exception): f()", 1),
    ("try: f()\nexcept Exception as e: g(e)", 0),
    ("try: f()\nexcept BaseException:\n  g()\n  raise", 0),
    ("try: f()\nexcept OSError: pass", 0),
  ],
)
def test_the_swallow_rule_finds(source, count):
  assert len(swallow_findings(source)) == count


@pytest.mark.parametrize("source", ["import os", '"""D."""\ndef f(): pass'])
def test_the_door_rule_finds(source):
  assert len(door_findings(source)) == 1
