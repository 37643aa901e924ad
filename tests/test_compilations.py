"""Programs that are compiled once, whatever the numbers of a call are."""

import jax
import jax.numpy as jnp
import pytest

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")

COMPILED: list[str] = []


def _record(event: str, seconds: float, **about: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(about.get("fun_name", "")))


jax.monitoring.register_event_duration_secs_listener(_record)


@pytest.fixture(scope="module")
def problem():
    data = esl.datasets.two_moons(60)
    potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train, batch_size=8)
    return esl.Problem(potential, members=4, steps=6, snapshots=3, test=data.test)


def compared(problem, seed, iterations):
    return esl.compare(
        problem,
        key=jax.random.key(seed),
        shapes={"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)},
        rate=0.2,
        knots=3,
        iterations=iterations,
        match_runs=2,
        judge_runs=2,
    )


def test_another_seed_and_length_of_a_comparison_compile_nothing(problem):
    """Another seed finds another target, which the search must not hold as a constant."""
    COMPILED.clear()  # other tests of the same process compile too
    first = compared(problem, 0, 8)
    # Matching, judging and what is measured beside share the run.
    assert COMPILED.count("jit(_path)") == 1
    COMPILED.clear()
    second = compared(problem, 1, 12)
    assert first.target != second.target
    # The symmetry of a network is looked for, and tried, at each call.
    assert set(COMPILED) <= {"jit(change)"}


def test_a_longer_search_compiles_nothing():
    def objective(x, key):
        return jnp.sum((x - 3) ** 2) + jax.random.normal(key)

    start = jnp.zeros(3)
    esl.optimize(objective, start, key=jax.random.key(0), iterations=8)
    COMPILED.clear()
    found = esl.optimize(objective, start, key=jax.random.key(1), iterations=200)
    assert COMPILED == []
    assert found.controls == pytest.approx(3, abs=0.05)
