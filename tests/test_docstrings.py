"""Every example in a docstring runs as it stands, and every public class and function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import esljax as esl

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(esl.__path__, "esljax.")
    if not module.name.endswith("__main__")
)
PUBLIC = {
    name: value
    for name, value in ((name, getattr(esl, name)) for name in esl.__all__)
    if inspect.isclass(value) or inspect.isroutine(value)
}
# Why a public name has no example of its own.
WITHOUT = {
    "InputError": "an exception, which the examples of no caller should raise",
    "Terminated": "an exception that ends the process",
}


@pytest.fixture(autouse=True)
def somewhere_else(tmp_path, monkeypatch):
    """An example that writes a file leaves none behind."""
    monkeypatch.chdir(tmp_path)


def examples(value):
    return [test for test in doctest.DocTestFinder(recurse=False).find(value) if test.examples]


@pytest.mark.parametrize("module", ["esljax", *MODULES])
def test_examples_run(module):
    """With nothing predefined: whoever copies an example finds all of its imports in it."""
    assert doctest.testmod(importlib.import_module(module), globs={}).failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example(name):
    assert bool(examples(PUBLIC[name])) != (name in WITHOUT)
