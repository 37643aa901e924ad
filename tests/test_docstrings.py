"""Every example in a docstring runs as it stands, and every public class and function has one."""

import doctest
import importlib
import pkgutil

import pytest

import esljax as esl

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(esl.__path__, "esljax.")
    if not module.name.endswith("__main__")
)
pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")
PUBLIC = [name for name in esl.__all__ if callable(getattr(esl, name))]
# Public names without an example of their own, and where one stands.
WITHOUT = {
    "Comparison": "compare",
    "FreeEnergy": "free_energy",
    "Front": "front",
    "Optimum": "optimize",
    "Plan": "plan_memory",
    "Solution": "ExactTransport",
    "SpeedLimit": "speed_limit",
    "Terminated": "Checkpoints",
    "Trajectory": "simulate",
}


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """An example that writes a file leaves none behind."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("module", ["esljax", *MODULES])
def test_examples_run(module):
    """With nothing predefined: whoever copies an example finds all of its imports in it."""
    assert doctest.testmod(importlib.import_module(module), globs={}).failed == 0


def has_example(name):
    (docstring,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(
        getattr(esl, name), name
    )
    return bool(docstring.examples)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    assert has_example(WITHOUT.get(name, name))
    assert name not in WITHOUT or not has_example(name), "the list is out of date"
