"""Public names: all that are listed exist, and names of 0.1 lead to what they have become."""

import subprocess
import sys
import warnings

import pytest

import esljax as esl

# Every public name before the package had rooms, except those that kept their name.
RENAMED = {
    "AbstractDensity": "density.AbstractDensity",
    "AbstractEntropy": "density.AbstractEntropy",
    "AbstractLogDensity": "density.AbstractLogDensity",
    "Controls": "simulation.Controls",
    "Entropy": "density.Entropy",
    "Evidence": "measures.Evidence",
    "Finding": "measures.Finding",
    "FlowDensity": "density.FlowDensity",
    "FlowEntropy": "density.FlowEntropy",
    "GaussianDensity": "density.GaussianDensity",
    "GaussianEntropy": "density.GaussianEntropy",
    "HistogramDensity": "density.HistogramDensity",
    "HistogramEntropy": "density.HistogramEntropy",
    "History": "optimization.History",
    "Interval": "measures.Interval",
    "Iteration": "optimization.Iteration",
    "KDEEntropy": "density.KDEEntropy",
    "KernelDensity": "density.KDEDensity",
    "LostWorkersError": "study.LostWorkersError",
    "Mapped": "MappedTransport",
    "MinibatchNoise": "measures.MinibatchNoise",
    "NearestNeighborEntropy": "density.NearestNeighborEntropy",
    "Projected": "ProjectedTransport",
    "Split": "measures.Split",
    "Study": "study.Study",
    "TransportedEntropy": "density.TransportedEntropy",
    "Velocity": "velocity.Velocity",
    "executors": "study.executors",
    "open_study": "study.open_study",
    "plan": "plan_memory",
    "recorded": "from_snapshots",
    "run_study": "study.run_study",
    "summarize": "study.summarize",
}
KEPT = [
    "AbstractGradient",
    "AbstractPotential",
    "AbstractRule",
    "AbstractSchedule",
    "AbstractTransport",
    "AbstractVelocity",
    "AffineVelocity",
    "Autodiff",
    "Checkpoints",
    "Constant",
    "Cosine",
    "DoubleWell",
    "Driven",
    "Equality",
    "ExactTransport",
    "Exponential",
    "FlaxLoss",
    "FlowVelocity",
    "ForwardMode",
    "FreeEnergy",
    "FromFunction",
    "FromOptax",
    "GaussianTransport",
    "HessianAdjoint",
    "HistogramVelocity",
    "InputError",
    "KDEVelocity",
    "KernelVelocity",
    "Knots",
    "Langevin",
    "Linear",
    "Mixture",
    "NetworkVelocity",
    "Optimum",
    "PathVelocity",
    "Plan",
    "ProbabilityFlow",
    "Quadratic",
    "RunConfig",
    "SinkhornTransport",
    "SlicedTransport",
    "Solution",
    "SpeedLimit",
    "Terminated",
    "Trajectory",
    "TransportVelocity",
    "WarmupStableDecay",
    "datasets",
    "free_energy",
    "gaussian",
    "member_mesh",
    "minibatch_noise",
    "models",
    "optimize",
    "principal_directions",
    "random_directions",
    "recordings",
    "run",
    "simulate",
    "speed_limit",
]


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_warns_and_leads_to_the_new_one(name):
    new = esl
    for part in RENAMED[name].split("."):
        new = getattr(new, part)
    with pytest.warns(DeprecationWarning, match=rf"esljax\.{name} is now esljax\.{RENAMED[name]};"):
        assert getattr(esl, name) is new
    assert name not in esl.__all__


def test_a_kept_name_is_silent():
    assert set(KEPT) <= set(esl.__all__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in esl.__all__:
            getattr(esl, name)


def test_lists_of_names_are_true():
    doors = [
        esl,
        esl.density,
        esl.measures,
        esl.potentials,
        esl.simulation,
        esl.study,
        esl.transport,
        esl.velocity,
    ]
    for door in doors:
        assert all(hasattr(door, name) for name in door.__all__)


@pytest.mark.parametrize(
    ("module", "name"),
    [("datasets", "digits"), ("executors", "slurm"), ("models", "mlp"), ("recordings", "read")],
)
def test_a_public_module_is_imported_as_before(module, name):
    program = f"from esljax.{module} import {name}; print({name}.__module__)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith(f".{module}")


def test_a_module_that_moved_says_where_it_went():
    with pytest.raises(ImportError, match=r"Module esljax\.dynamics has become part"):
        exec("from esljax import dynamics", {})


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'langevin'"):
        print(esl.langevin)


def test_import_loads_neither_figures_nor_commands_nor_extras():
    program = (
        "import sys, esljax\n"
        "heavy = {'matplotlib', 'tyro', 'ott', 'zarr', 'xarray', 'distributed', 'orbax'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
