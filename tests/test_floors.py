"""The architecture as one readable table, and the checks that hold the source against it.

A module imports only from lower floors, and each third-party library is met only within its fence. The checks read source text, so that
each is also fed a planted breach here: a check that cannot fail is no check.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the ground up: a module may import from the lines above its own, never from its own line or below.
FLOORS = (
    ("_types",),
    ("_checks", "_matrix", "_ott", "_style"),
    ("diagnosis", "schedules", "density", "sharding", "storage", "description"),
    ("report", "checkpoints"),
    ("potentials", "datasets", "models", "gaussian"),
    ("transport", "velocity", "entropy", "trajectory"),
    ("dynamics", "adjoint", "scores", "fields", "sinkhorn"),
    ("simulation",),
    ("chain", "minibatch"),
    ("entropy_production", "memory"),
    ("speed_limit", "free_energy"),
    ("optimization",),
    ("comparison", "recordings", "configuration"),
    ("runs", "references", "measurement"),
    ("study", "executors", "study_summary"),
    ("study_store", "plotting", "study_plotting"),
    ("study_run",),
    ("study_cli", "optimize_cli"),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}

# What every module may use beside the standard library, and who alone may use the rest.
EVERYWHERE = {"jax", "numpy", "equinox"}
FENCES = {
    "jaxtyping": {"_types"},
    "flax": {"potentials", "models"},
    "sklearn": {"datasets"},
    "ott": {"_ott"},
    "optax": {"optimization", "density", "fields"},
    "flowjax": {"density"},
    "scipy": {"comparison"},
    "tomli_w": {"storage"},
    "matplotlib": {"plotting", "study_plotting"},
    "rich": {"cli", "references", "study_cli", "optimize_cli"},
    # Settings are the flags; only `cli` parses them.
    "tyro": {"cli", "configuration", "study_cli"},
    "safetensors": {"recordings"},
    "orbax": {"recordings", "checkpoints"},
    "zarr": {"recordings", "study_store"},
    "xarray": {"study_store"},
    "distributed": {"executors"},
    "dask_jobqueue": {"executors"},
}
# Where the name to install is another.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "ott": "ott-jax",
    "tomli_w": "tomli-w",
    "orbax": "orbax-checkpoint",
    "dask_jobqueue": "dask-jobqueue",
}
# What only extras install, and which.
EXTRAS = {"zarr": ("zarr", "studies"), "xarray": ("studies",), "distributed": ("cluster",), "dask-jobqueue": ("cluster",)}

LONGEST = 600


# --- The checker --------------------------------------------------------------------------------------------------------------------------


def breaches(module: str, source: str) -> list[str]:
    """What is wrong with one file, in sentences."""
    tree = ast.parse(source)
    rules = (_misplaced, _upward, _unfenced, _forbidden, _sinks, _undocumented, _too_long)
    return [f"{module}: {sentence}" for rule in rules for sentence in rule(module, tree, source)]


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            # `from esljax import gaussian` imports a module, `from esljax import simulate` the whole package.
            whole = name in ("esljax", "equinox", "jax")
            yield from (f"{name}.{alias.name}" for alias in node.names) if whole else (name,)


def within(tree: ast.Module) -> set[str]:
    """The modules of the package that a file imports."""
    found = set()
    for name in imports(tree):
        if name.split(".")[0] == "esljax":
            part = name.partition(".")[2].split(".")[0]
            found.add(part if part in FLOOR else "__init__")
    return found


def cycle(sources: dict[str, str]) -> list[str]:
    """A cycle of imports, or nothing."""
    edges = {module: within(ast.parse(source)) & set(sources) for module, source in sources.items()}

    def walk(path: tuple[str, ...]) -> list[str]:
        for module in sorted(edges[path[-1]]):
            found = [*path[path.index(module) :], module] if module in path else walk((*path, module))
            if found:
                return found
        return []

    return next(filter(None, (walk((module,)) for module in sorted(sources))), [])


def _misplaced(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    if module == "utils":
        yield "a module is named after what it holds, not utils"
    if module not in FLOOR:
        yield "has no floor"


def _upward(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    for other in sorted(within(tree)):
        if FLOOR[other] >= FLOOR.get(module, 0):
            yield f"imports {other}, which is not on a lower floor"
    for name in imports(tree):
        if name.startswith("."):
            yield f"imports {name} by a relative path"


def _unfenced(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    for library in sorted({name.split(".")[0] for name in imports(tree) if not name.startswith(".")}):
        if library in sys.stdlib_module_names or library in EVERYWHERE or library == "esljax":
            continue
        if module not in FENCES.get(library, ()):
            yield f"imports {library} outside its fence"


def _forbidden(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    imported = set(imports(tree))
    if (
        any(name.startswith("equinox.internal") for name in imported)
        or _reads(tree, "eqx", "internal")
        or _reads(tree, "equinox", "internal")
    ):
        yield "uses equinox.internal"
    if "pmap" in names or any(name.endswith(".pmap") for name in imported):
        yield "uses jax.pmap"
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"asserts at line {node.lineno}, which -O removes"


def _reads(tree: ast.Module, owner: str, attribute: str) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.value, ast.Name) and node.value.id == owner
        for node in ast.walk(tree)
    )


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        dunder = getattr(node, "name", "").startswith("__")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (dunder or not node.name.startswith("_")):
            yield node


def _sinks(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    for node in _public(tree.body):
        for function in _public(node.body) if isinstance(node, ast.ClassDef) else (node,):
            if not isinstance(function, ast.ClassDef) and function.args.kwarg is not None:
                yield f"{function.name} takes **{function.args.kwarg.arg}, which swallows misspelled names"


def _undocumented(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "has no docstring"
    for node in _public([] if module.startswith("_") else tree.body):
        if not ast.get_docstring(node):
            yield f"{node.name} has no docstring"
        for method in _public(node.body) if isinstance(node, ast.ClassDef) else ():
            # What overrides an abstract method inherits what is said there.
            if any(ast.unparse(mark).endswith("abstractmethod") for mark in method.decorator_list) and not ast.get_docstring(method):
                yield f"{node.name}.{method.name} has no docstring"


def _too_long(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    if len(source.splitlines()) > LONGEST:
        yield f"has {len(source.splitlines())} lines, over {LONGEST}: make it a folder along a noun"


# --- The package --------------------------------------------------------------------------------------------------------------------------


SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "esljax").rglob("*.py"))}


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_keeps_the_rules(module):
    assert breaches(module, SOURCES[module]) == []


def test_no_cycle():
    assert cycle(SOURCES) == []


def test_the_map_names_what_exists():
    """No floor and no fence for what is gone, and no fence wider than its use."""
    assert set(FLOOR) == set(SOURCES)
    assert len(FLOOR) == sum(map(len, FLOORS))
    used = {library: {module for module, source in SOURCES.items() if library in _libraries(source)} for library in FENCES}
    assert used == FENCES


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w-]+", requirement).group().lower() for requirement in project["dependencies"]}
    assert {DISTRIBUTIONS.get(library, library) for library in EVERYWHERE | set(FENCES)} - set(EXTRAS) <= names
    assert not set(EXTRAS) & names
    for library, extras in EXTRAS.items():
        for extra in extras:
            assert any(requirement.startswith(library) for requirement in project["optional-dependencies"][extra])


def _libraries(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(ast.parse(source))}


# --- The checker catches what it should ---------------------------------------------------------------------------------------------------

PLANTED = [
    ("schedules", "from esljax.potentials import Quadratic", "imports potentials, which is not on a lower floor"),
    ("schedules", "from esljax import report", "imports report, which is not on a lower floor"),
    ("schedules", "import esljax.schedules", "imports schedules, which is not on a lower floor"),
    ("cli", "from esljax import simulate", "imports __init__, which is not on a lower floor"),
    ("gaussian", "def run():\n    'Runs.'\n    from esljax.simulation import simulate", "imports simulation, which is not"),
    ("transport", "from . import gaussian", "imports . by a relative path"),
    ("physics", "", "has no floor"),
    ("utils", "", "is named after what it holds"),
    ("schedules", "import optax", "imports optax outside its fence"),
    ("simulation", "from flax import nnx", "imports flax outside its fence"),
    ("report", "def show():\n    'Shows.'\n    import rich.table", "imports rich outside its fence"),
    ("plotting", "import pandas", "imports pandas outside its fence"),
    ("dynamics", "from jaxtyping import Float", "imports jaxtyping outside its fence"),
    ("simulation", "import equinox.internal as eqxi", "uses equinox.internal"),
    ("simulation", "from equinox import internal", "uses equinox.internal"),
    ("simulation", "from equinox.internal import while_loop", "uses equinox.internal"),
    ("simulation", "import equinox as eqx\n_loop = eqx.internal.while_loop", "uses equinox.internal"),
    ("simulation", "import jax\n_many = jax.pmap(abs)", "uses jax.pmap"),
    ("simulation", "from jax import pmap", "uses jax.pmap"),
    ("speed_limit", "def speed(**kwargs):\n    'Runs.'", r"speed takes \*\*kwargs"),
    ("speed_limit", "class Speed:\n    'Runs.'\n    def __init__(self, **options): ...", r"__init__ takes \*\*options"),
    ("speed_limit", "def _of_one(n):\n    assert n > 1", "asserts at line 3"),
    ("speed_limit", "def speed(): ...", "speed has no docstring"),
    ("speed_limit", "class Speed: ...", "Speed has no docstring"),
    (
        "dynamics",
        "import abc\nclass Rule:\n    'A rule.'\n    @abc.abstractmethod\n    def step(self): ...",
        "Rule.step has no docstring",
    ),
    ("speed_limit", "\n" * LONGEST, "has 601 lines, over 600"),
]


@pytest.mark.parametrize(("module", "source", "sentence"), PLANTED)
def test_a_planted_breach_is_seen(module, source, sentence):
    assert any(re.search(sentence, said) for said in breaches(module, '"""A module."""\n' + source))


def test_a_module_without_a_docstring_is_seen():
    assert breaches("report", "x = 1") == ["report: has no docstring"]


def test_a_planted_cycle_is_seen():
    sources = {"report": "import esljax.cli", "cli": "from esljax import storage", "storage": "from esljax.report import split"}
    assert sorted(cycle(sources)[1:]) == sorted(sources)
    assert cycle({**sources, "storage": ""}) == []


def test_what_is_allowed_passes():
    source = (
        '"""A module."""\nimport math\nimport jax.numpy as jnp\nimport optax\nfrom esljax._types import Array\n'
        "from esljax import gaussian\ndef _inner(**options): ...\nclass Found:\n    'Is.'\n    def solve(self, *args): ...\n"
    )
    assert breaches("fields", source) == []
