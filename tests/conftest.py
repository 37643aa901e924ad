"""Options, order and fixtures of all tests."""

import contextlib
import gc
import os
import re
import signal
import sys

import caching
import hypothesis
import jax
import jaxtyping
import pytest
from durations import Recorder, longest_first

import esljax as esl

# Several test processes share one accelerator: none may take all of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Half of the tests' time is compilation. The CPU compiler of jax 0.10 spends much of that on
# emitters of fused loops, which it can do without (44 tests of free energies took 38 s instead of
# 62); jax 0.12 ends at such a flag. `XLA_FLAGS= pytest` compiles as users do.
if jax.__version__.startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Tracing makes many objects and no garbage. The default looks through them at every 700th, which
# costs a tenth of the time.
gc.set_threshold(100_000, 20, 100)
# Examples compile, and cores may be busy with other work.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser):
    parser.addoption(
        "--no-compilation-cache",
        action="store_true",
        help="compile everything anew instead of keeping programs between runs",
    )


def pytest_configure(config):
    _deliver_signals()
    # Commands must not write into the cache of whoever runs the tests.
    os.environ["ESLJAX_COMPILATION_CACHE"] = "off"
    if config.getoption("no_compilation_cache"):
        caching.disable()
    # A folder that was chosen outside is used as it is; workers inherit ours.
    elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            caching.enable(caching.folder())
        except OSError as error:
            # No warning: warnings are errors here, and this one would end the run.
            if not hasattr(config, "workerinput"):
                print(f"The tests run without a compilation cache: {error}", file=sys.stderr)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(caching.folder() / "durations.json"))


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items[:] = longest_first(items, config.workerinput["seconds"])


def _deliver_signals():
    """Give signals back to this process and its children where the shell let them be ignored.

    A script starts its background processes with SIGINT ignored, `nohup` ignores SIGHUP, and
    children inherit that. A signal with a handler is at its default in a child.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # this process still outlives its terminal


@pytest.fixture(autouse=True, scope="module")
def released():
    """Drop the programs of a file at its end.

    The next file has no use for them. Kept, they grow to gigabytes and to more mappings than a
    process may have.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def precision_restored():
    """Undo the precision that a command line chose."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def x64(precision_restored):
    """Compute in double precision within one test."""
    jax.config.update("jax_enable_x64", True)


@pytest.fixture
def refused(request):
    """Return a check that a call raises `InputError` with one sentence.

    Where the run checks annotations (`--jaxtyping-packages`), a value of the wrong type does not
    get as far as its sentence.
    """
    annotations = request.config.getoption("jaxtyping_packages", None)

    def check(call, sentence):
        with pytest.raises(
            (esl.InputError, jaxtyping.TypeCheckError) if annotations else esl.InputError
        ) as caught:
            call()
        if isinstance(caught.value, esl.InputError):
            message = str(caught.value)
            assert re.search(sentence, message)
            assert message.count(". ") == 0
            assert "\n" not in message

    return check


@contextlib.contextmanager
def _hardly_optimized():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_compilation():
    """Optimize little: for tests that compile much and compute little."""
    with _hardly_optimized():
        yield


@pytest.fixture(scope="module")
def quick_compilation_of_all():
    """Optimize little in all of a file and its fixtures."""
    with _hardly_optimized():
        yield


@pytest.fixture(scope="session")
def environment(request, tmp_path_factory):
    """Return the environment of processes that a test starts: compiled hardly optimized, and once.

    Such processes are killed while they write a program and print to a stderr that tests read, so
    they keep silent about programs that they cannot read.
    """
    silent = os.environ.get("PYTHONWARNINGS"), caching.SILENT
    settings = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONWARNINGS": ",".join(filter(None, silent)),
    }
    if request.config.getoption("no_compilation_cache"):
        settings |= caching.settings(tmp_path_factory.mktemp("compiled"))
    return {**os.environ, **settings}
