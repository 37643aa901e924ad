"""The architecture as one readable table, and checks that the source keeps to it.

A module imports only from lower floors, and only the rooms in its fence import a third-party
library. The checks read source text, so each is also given a planted breach here: a check that
cannot fail is no check.
"""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import esljax

ROOT = Path(__file__).parent.parent


def _name(path: Path) -> str:
    """Return the name below the package: `transport.exact` for a file, `transport` for a door."""
    parts = path.relative_to(ROOT / "esljax").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


SOURCES = {
    _name(path): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "esljax").rglob("*.py"))
}
FOLDERS = sorted({name.split(".")[0] for name in SOURCES if "." in name})

# From the ground up: a room, a folder or a single file, imports only from the floors below its own.
FLOORS = (
    ("_starting", "_types"),
    ("_checks",),
    ("_numerics", "results", "sharding", "files", "figures"),
    ("schedules",),
    ("density", "potentials"),
    ("transport",),
    ("velocity",),
    ("simulation",),
    ("measures",),
    ("gaussian", "optimization"),
    ("experiment",),
    ("study",),
    ("command",),
    ("__main__", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# All of the package is seen at one glance.
MOST_ROOMS = 22

# Libraries that every module may use, and the only rooms that may use each of the others.
EVERYWHERE = {"jax", "numpy", "equinox"}
FENCES = {
    "jaxtyping": {"_types"},
    "flax": {"potentials"},
    "sklearn": {"potentials"},
    "ott": {"transport"},
    "optax": {"optimization", "density", "velocity", "gaussian", "experiment"},
    "flowjax": {"density"},
    "scipy": {"experiment", "measures"},
    "tomli_w": {"files"},
    "matplotlib": {"figures"},
    "rich": {"command"},
    "tyro": {"command"},
    "safetensors": {"files"},
    "orbax": {"files"},
    "tensorstore": {"files"},
    "zarr": {"files", "study"},
    "xarray": {"study"},
    "distributed": {"study"},
    "dask_jobqueue": {"study"},
    "cloudpickle": {"experiment"},
}
# Names to install, where they differ.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "ott": "ott-jax",
    "tomli_w": "tomli-w",
    "orbax": "orbax-checkpoint",
    "dask_jobqueue": "dask-jobqueue",
}
# Libraries that only extras install, and which extras.
EXTRAS = {
    "zarr": ("zarr", "studies"),
    "xarray": ("studies",),
    "distributed": ("cluster",),
    "dask-jobqueue": ("cluster",),
    "cloudpickle": ("cluster",),
}

# Lines of a module; a longer one becomes a folder.
LONGEST = 700


# --- The checker ----------------------------------------------------------------------------------


def breaches(module: str, source: str) -> list[str]:
    """Return sentences on the breaches of a file ("transport.exact") or a door ("transport")."""
    tree = ast.parse(source)
    rules = (
        _misplaced,
        _upward,
        _past_the_door,
        _unfenced,
        _forbidden,
        _sinks,
        _undocumented,
        _too_long,
    )
    return [f"{module}: {sentence}" for rule in rules for sentence in rule(module, tree, source)]


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of every module that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = "." * node.level + (node.module or "")
            # `from esljax import gaussian` imports a module, `from esljax import simulate` the
            # whole package.
            names = [f"{name}.{alias.name}" for alias in node.names]
            yield from (
                full if name in ("equinox", "jax", "esljax") or _file(full) else name
                for full in names
            )


def _file(name: str) -> bool:
    """Return whether this is the full name of a file within a room."""
    return name.startswith("esljax.") and name.partition(".")[2] in SOURCES and name.count(".") == 2


def within(tree: ast.Module) -> set[str]:
    """Return the modules of the package that a file imports: rooms by their doors, or files."""
    modules = set()
    for name in imports(tree):
        if name.split(".")[0] == "esljax":
            part = name.partition(".")[2]
            modules.add(part if part.split(".")[0] in FLOOR else "__init__")
    return modules


def room(module: str) -> str:
    return module.split(".")[0]


def exported(folder: str) -> list[str]:
    """Return the names that a door lists."""
    lists = [node.value for node in ast.parse(SOURCES[folder]).body if isinstance(node, ast.Assign)]
    return [name for listed in lists for name in ast.literal_eval(listed)]


def cycle(sources: dict[str, str]) -> list[str]:
    """Return a cycle of imports, or nothing."""
    edges = {module: within(ast.parse(source)) & set(sources) for module, source in sources.items()}
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def _misplaced(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    if module.split(".")[-1] == "utils":
        yield "a module is named after what it holds, not utils"
    if room(module) not in FLOOR:
        yield "has no floor"


def _upward(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    for other in sorted(
        {room(other) for other in within(tree)} - {room(module)}
        if "." in module
        else map(room, within(tree))
    ):
        own_files = other == module and all(
            "." in name for name in within(tree) if room(name) == module
        )
        if FLOOR[other] >= FLOOR.get(room(module), 0) and not own_files:
            yield f"imports {other}, which is not on a lower floor"
    for name in imports(tree):
        if name.startswith("."):
            yield f"imports {name} by a relative path"


def _past_the_door(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    """Files outside a room import its door; files inside import each other."""
    for other in sorted(within(tree)):
        if (
            "." in other
            and room(other) != room(module)
            and other.split(".")[1] not in exported(room(other))
        ):
            yield f"reaches for {other} past the door of {room(other)}"
        if "." in module and other == room(module):
            yield f"imports {other}, its own door"


def _unfenced(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    for library in sorted(
        {name.split(".")[0] for name in imports(tree) if not name.startswith(".")}
    ):
        if library in sys.stdlib_module_names or library in EVERYWHERE or library == "esljax":
            continue
        if room(module) not in FENCES.get(library, ()):
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
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        for node in ast.walk(tree)
    )


def _public(
    body: list[ast.stmt],
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        dunder = getattr(node, "name", "").startswith("__")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and (
            dunder or not node.name.startswith("_")
        ):
            yield node


def _sinks(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    for node in _public(tree.body):
        for function in _public(node.body) if isinstance(node, ast.ClassDef) else (node,):
            if not isinstance(function, ast.ClassDef) and function.args.kwarg is not None:
                sink = function.args.kwarg.arg
                yield f"{function.name} takes **{sink}, which swallows misspelled names"


def _undocumented(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "has no docstring"
    for node in _public([] if module.split(".")[-1].startswith("_") else tree.body):
        if not ast.get_docstring(node):
            yield f"{node.name} has no docstring"
        for method in _public(node.body) if isinstance(node, ast.ClassDef) else ():
            # An override of an abstract method inherits its docstring.
            if any(
                ast.unparse(mark).endswith("abstractmethod") for mark in method.decorator_list
            ) and not ast.get_docstring(method):
                yield f"{node.name}.{method.name} has no docstring"


def _too_long(module: str, tree: ast.Module, source: str) -> Iterator[str]:
    if len(source.splitlines()) > LONGEST:
        yield f"has {len(source.splitlines())} lines, over {LONGEST}: make it a folder along a noun"


# --- The package ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_keeps_the_rules(module):
    assert breaches(module, SOURCES[module]) == []


def test_no_cycle():
    assert cycle(SOURCES) == []


def test_the_map_names_what_exists():
    """Every floor and fence names an existing room, and no fence is wider than its use."""
    assert set(FLOOR) == {room(module) for module in SOURCES}
    assert len(FLOOR) == sum(map(len, FLOORS)) <= MOST_ROOMS
    used = {
        library: {
            room(module) for module, source in SOURCES.items() if library in _libraries(source)
        }
        for library in FENCES
    }
    assert used == FENCES


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_door_only_opens(folder):
    """It imports its own files and lists names, and no public function has its name."""
    docstring, *statements = ast.parse(SOURCES[folder]).body
    assert isinstance(docstring, ast.Expr)
    assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in statements)
    assert {room(other) for other in within(ast.parse(SOURCES[folder]))} == {folder}
    assert not callable(getattr(esljax, folder, None))


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {
        re.match(r"[\w-]+", requirement).group().lower() for requirement in project["dependencies"]
    }
    assert {DISTRIBUTIONS.get(library, library) for library in EVERYWHERE | set(FENCES)} - set(
        EXTRAS
    ) <= names
    assert not set(EXTRAS) & names
    for library, extras in EXTRAS.items():
        for extra in extras:
            assert any(
                requirement.startswith(library)
                for requirement in project["optional-dependencies"][extra]
            )


def _libraries(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(ast.parse(source))}


# --- The checker catches what it should -----------------------------------------------------------

PLANTED = [
    (
        "schedules",
        "from esljax.potentials import Quadratic",
        "imports potentials, which is not on a lower floor",
    ),
    ("schedules", "from esljax import measures", "imports measures, which is not on a lower floor"),
    ("schedules", "import esljax.schedules", "imports schedules, which is not on a lower floor"),
    (
        "potentials.base",
        "from esljax.transport import Solution",
        "imports transport, which is not on a lower floor",
    ),
    (
        "potentials",
        "from esljax.simulation import simulate",
        "imports simulation, which is not on a lower floor",
    ),
    (
        "command.cli",
        "from esljax import simulate",
        "imports __init__, which is not on a lower floor",
    ),
    (
        "density.flow",
        "def run():\n    'Runs.'\n    from esljax.simulation import simulate",
        "imports simulation, which is not",
    ),
    (
        "simulation.loop",
        "from esljax.potentials.flax import FlaxLoss",
        "reaches for potentials.flax past the door of potentials",
    ),
    (
        "command.check",
        "from esljax.files import description",
        "reaches for files.description past the door of files",
    ),
    ("transport.exact", "from esljax.transport import Solution", "imports transport, its own door"),
    ("transport.exact", "from . import gaussian", "imports . by a relative path"),
    ("physics", "", "has no floor"),
    ("physics.waves", "", "has no floor"),
    ("transport.utils", "", "is named after what it holds"),
    ("schedules", "import optax", "imports optax outside its fence"),
    ("simulation.loop", "from flax import nnx", "imports flax outside its fence"),
    (
        "measures.report",
        "def show():\n    'Shows.'\n    import rich.table",
        "imports rich outside its fence",
    ),
    ("figures.study", "import pandas", "imports pandas outside its fence"),
    ("simulation.rules", "from jaxtyping import Float", "imports jaxtyping outside its fence"),
    ("simulation.loop", "import equinox.internal as eqxi", "uses equinox.internal"),
    ("simulation.loop", "from equinox import internal", "uses equinox.internal"),
    ("simulation.loop", "from equinox.internal import while_loop", "uses equinox.internal"),
    (
        "simulation.loop",
        "import equinox as eqx\n_loop = eqx.internal.while_loop",
        "uses equinox.internal",
    ),
    ("simulation.loop", "import jax\n_many = jax.pmap(abs)", "uses jax.pmap"),
    ("simulation.loop", "from jax import pmap", "uses jax.pmap"),
    ("measures.speed_limit", "def speed(**kwargs):\n    'Runs.'", r"speed takes \*\*kwargs"),
    (
        "measures.speed_limit",
        "class Speed:\n    'Runs.'\n    def __init__(self, **options): ...",
        r"__init__ takes \*\*options",
    ),
    ("measures.speed_limit", "def _of_one(n):\n    assert n > 1", "asserts at line 3"),
    ("measures.speed_limit", "def speed(): ...", "speed has no docstring"),
    ("measures.speed_limit", "class Speed: ...", "Speed has no docstring"),
    (
        "simulation.rules",
        "import abc\nclass Rule:\n    'A rule.'\n    @abc.abstractmethod\n    def step(self): ...",
        "Rule.step has no docstring",
    ),
    ("measures.speed_limit", "\n" * LONGEST, "has 701 lines, over 700"),
]


@pytest.mark.parametrize(("module", "source", "sentence"), PLANTED)
def test_a_planted_breach_is_seen(module, source, sentence):
    assert any(re.search(sentence, one) for one in breaches(module, '"""A module."""\n' + source))


def test_a_module_without_a_docstring_is_seen():
    assert breaches("gaussian", "x = 1") == ["gaussian: has no docstring"]


def test_a_planted_cycle_is_seen():
    sources = {
        "measures": "from esljax.measures.report import split",
        "measures.report": "import esljax.files",
        "files": "from esljax.files.storage import locked",
        "files.storage": "from esljax.measures import split",
    }
    assert sorted(cycle(sources)[1:]) == sorted(sources)
    assert cycle({**sources, "files.storage": ""}) == []


def test_what_is_allowed_passes():
    source = (
        '"""A module."""\nimport math\nimport jax.numpy as jnp\nimport optax\n'
        "from esljax._types import Array\n"
        "from esljax.density import Frame\nfrom esljax.velocity.base import Velocity\n"
        "def _inner(**options): ...\nclass Found:\n    'Is.'\n    def solve(self, *args): ...\n"
    )
    assert breaches("velocity.network", source) == []
