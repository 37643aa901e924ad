"""One convention for the errors of results, and one printer of tables."""

import copy
import pickle
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.measures.report import NUMBERS
from esljax.results import StandardErrors, concise, measured, table

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def path():
    start = 3 + jax.random.normal(KEY, (8, 2))
    return esl.simulate(
        esl.Quadratic(1.0), esl.Langevin(0.1, 0.05), start, steps=8, snapshots=4, key=KEY
    )


@pytest.fixture(scope="module")
def report(path):
    return esl.speed_limit(path, transport=esl.GaussianTransport(), jackknife=4)


# Errors


def test_errors_are_attributes_under_the_names_of_the_numbers():
    errors = StandardErrors({"gap": 0.5, "debiased_gap": None})
    assert errors.gap == 0.5
    assert errors.debiased_gap is None
    assert "gap" in errors
    assert "speed" not in errors
    assert errors.get("speed") is None
    with pytest.raises(AttributeError, match="'speed'; there is one of: gap, debiased_gap"):
        _ = errors.speed
    with pytest.raises(AttributeError, match="there is one of: none"):
        _ = StandardErrors({}).gap


def test_errors_pass_through_jax():
    errors = StandardErrors({"gap": jnp.array(0.5), "w2_squared": jnp.array(2.0), "none": None})
    doubled = jax.tree.map(lambda x: 2 * x, errors)
    assert (float(doubled.gap), float(doubled.w2_squared), doubled.none) == (1.0, 4.0, None)
    assert float(jax.jit(lambda e: e.gap + e.w2_squared)(errors)) == 2.5
    stacked = jax.vmap(lambda x: StandardErrors({"gap": x}))(jnp.arange(3.0))
    np.testing.assert_array_equal(stacked.gap, [0, 1, 2])
    assert float(jax.grad(lambda e: e.gap**2)(StandardErrors({"gap": jnp.array(3.0)})).gap) == 6.0
    moved = eqx.tree_at(lambda e: e.gap, errors, jnp.array(7.0))
    assert float(moved.gap) == 7.0


def test_errors_are_copied_and_pickled(report):
    again = pickle.loads(pickle.dumps(report))
    assert isinstance(again.standard_error, StandardErrors)
    assert float(again.standard_error.gap) == float(report.standard_error.gap) > 0
    assert copy.deepcopy(StandardErrors({"gap": 0.5})).gap == 0.5


def test_errors_print():
    errors = StandardErrors({"gap": 0.52, "w2_squared": jnp.array(10.0), "dissipation": None})
    assert str(errors) == "gap         ± 0.52\nw2_squared  ± 10"
    assert "StandardErrors" in str(StandardErrors({"gap": jnp.ones(2)}))
    assert "StandardErrors" in str(jax.eval_shape(lambda: StandardErrors({"gap": jnp.ones(())})))


def test_every_report_has_them(path, report):
    books = esl.free_energy(
        path,
        esl.Quadratic(1.0),
        entropy=esl.density.GaussianEntropy(),
        velocity=esl.AffineVelocity(),
    )
    for result, words in ((report, "jackknife over 4 groups"), (books, "over 8 members")):
        assert isinstance(result.standard_error, StandardErrors)
        assert result.errors.startswith(words)
        for name in result.standard_error.numbers:
            error = result.standard_error.get(name)
            assert error is None or np.shape(error) == np.shape(getattr(result, name)), name
    assert report.standard_error.debiased_gap is None


@pytest.mark.parametrize("velocity", [None, esl.AffineVelocity()], ids=["chain", "velocity"])
@pytest.mark.parametrize("debias", [False, True])
def test_every_number_of_a_report_has_an_error_and_nothing_else_has(path, velocity, debias):
    report = esl.speed_limit(
        path,
        transport=esl.GaussianTransport(),
        velocity=velocity,
        potential=None if velocity is None else esl.Quadratic(1.0),
        jackknife=4,
        debias=debias,
    )
    assert set(report.standard_error.numbers) == set(NUMBERS)
    for name in NUMBERS:
        number, error = getattr(report, name), report.standard_error.get(name)
        assert (number is None) == (error is None), name
        assert number is None or (np.isfinite(float(error)) and float(error) >= 0), name


# Numbers and tables


def test_a_number_with_its_error():
    assert measured(236.2981, 1.1234) == "236.298 ± 1.1"
    assert measured(jnp.array(0.25)) == "0.25"
    assert measured(236.2981, 1.1234, digits=4) == "236.3 ± 1.1"
    assert measured(1.0, np.nan) == "1 ± not finite"


def test_the_one_error_of_a_result_is_still_a_number():
    with pytest.warns(DeprecationWarning, match=r"standard_error\.value"):
        assert float(StandardErrors({"value": 0.5})) == 0.5
    with pytest.raises(TypeError, match=r"read by name, such as \.gap"):
        float(StandardErrors({"gap": 0.5, "temporal": 0.1}))


def test_concise():
    assert concise(76.717, 0.05) == "76.717(50)"
    assert concise(76.7, 12.0) == "77(12)"
    for error in (0.0, np.nan, np.inf):
        assert concise(76.717, error) == "76.72"
    assert concise(np.nan, 1.0) == "nan"


def test_a_table():
    rows = [("", "E", "note"), ("first", "1.5 ± 0.125", "x"), ("b", "-20.25", "long text")]
    assert table(rows, align="lrl").splitlines() == [
        "            E          note",
        "first     1.5 ± 0.125  x",
        "b      -20.25          long text",
    ]
    assert table([("ab", "1"), ("c", "23")]) == "ab   1\nc   23"
    with pytest.raises(ValueError, match=r"longer|shorter"):
        table([("a", "b"), ("c",)])


# Figures


def test_a_report_plots_itself(report):
    figure = report.plot()
    bars, speeds = figure.axes
    widths = [patch.get_width() for patch in bars.patches]
    np.testing.assert_allclose(
        widths,
        [float(x) for x in (report.w2_squared, report.geometric, report.temporal)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(speeds.lines[0].get_ydata(), report.speed)


def test_several_runs_are_not_plotted(report, refused):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), report)
    refused(stacked.plot, "Argument `report` must be of one run or an average")


def test_figures_load_matplotlib_only_when_asked():
    program = "import sys, esljax; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
