"""Runs that know their parameters by name, and reports by parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")
KEYS = {"bias": (1,), "kernel": (2, 1), "empty": (0, 3)}


def recording():
    """Return members of which the bias moves straight, and one weight back and forth."""
    random = np.random.default_rng(0)
    positions = np.broadcast_to(random.normal(size=(1, 8, 3)), (5, 8, 3)).copy()
    positions[:, :, 0] += np.linspace(0, 2, 5)[:, None]
    positions[:, :, 2] += np.array([0, 1, 0, 1, 0])[:, None] / 4
    return np.float32(positions)


def report(positions, keys, transport=None, **options):
    path = esl.from_snapshots(positions, keys=keys)
    transport = esl.ExactTransport() if transport is None else transport
    return esl.speed_limit(path, transport=transport, **{"jackknife": 0, **options})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"bias": (1,)}, "hold the 3 numbers of a member together, but holds 1 in 1 parameters"),
        (
            {"bias": 1, "kernel": (2,)},
            "the name of each parameter to its shape, but is {'bias'",
        ),
        ({"bias": (4,), "kernel": (-1,)}, "but has 'kernel' of shape"),
        ([("a", (1,)), ("a", (2,))], "name each parameter once"),
        ({0: (3,)}, "but has 0 of shape"),
        (3, "to its shape, but is 3"),
    ],
)
def test_keys_that_name_no_parameters_are_refused(refused, keys, sentence):
    refused(lambda: esl.from_snapshots(recording(), keys=keys), sentence)


def test_features_are_no_parameters():
    with pytest.raises(esl.InputError, match="be None for features"):
        esl.from_snapshots(recording(), observed=True, keys=KEYS)


@pytest.mark.parametrize(
    "transport",
    [
        esl.ExactTransport(),
        esl.GaussianTransport(),
        esl.SinkhornTransport(2.0),
        esl.ProjectedTransport(esl.ExactTransport(), jnp.eye(3)[:, :2]),
        esl.MappedTransport(esl.ExactTransport(), jnp.tanh),
    ],
    ids=lambda transport: transport.name,
)
def test_shares_are_those_of_the_members_displacements(transport):
    shares = report(recording(), KEYS, transport).by_key()
    assert [(share.key, share.coordinates) for share in shares] == [
        ("bias", 1),
        ("kernel", 2),
        ("empty", 0),
    ]
    # ∫ v² ds is 2² for the bias and (4/4)² for one weight; the way from start to end is the bias's.
    np.testing.assert_allclose(
        [share.entropy_production for share in shares], [0.8, 0.2, 0], atol=1e-5
    )
    np.testing.assert_allclose([share.w2_squared for share in shares], [1, 0, 0], atol=1e-5)
    np.testing.assert_allclose([share.waste for share in shares], [0, 1, 0], atol=1e-5)


def test_shares_are_taken_under_the_assignment_that_was_found():
    random = np.random.default_rng(1)
    cloud = random.normal(size=(8, 3))
    order = [random.permutation(8) for _ in range(3)]
    shuffled = np.stack([cloud[order[j]] + [0.01 * j, 0, 0] for j in range(3)])
    shares = {share.key: share for share in report(np.float32(shuffled), KEYS).by_key()}
    # In the given order the members' own displacements would be of all coordinates alike.
    assert shares["bias"].entropy_production > 0.999
    assert shares["bias"].w2_squared > 0.999


def test_a_run_that_is_straight_wastes_nothing_and_its_shares_are_not_known():
    straight = recording()[[0]] + np.linspace(0, 1, 5, dtype=np.float32)[:, None, None]
    assert [share.waste for share in report(straight, KEYS).by_key()] == [None, None, None]


def test_tables_show_ten_parameters_and_the_rest():
    random = np.random.default_rng(0)
    moves = np.cumsum(random.normal(size=(5, 8, 24)), axis=0)
    shares = report(np.float32(moves), {f"k{i}": (2,) for i in range(12)}).by_key()
    lines = str(shares).splitlines()
    assert len(shares) == 12 == len(lines)
    assert lines[0].split()[:2] == ["key", "coordinates"]
    assert lines[-1].startswith("the other 2")
    percent = sum(float(line.split("  ")[-1].strip(" %")) for line in lines[1:])
    assert abs(percent - 100) < 0.5


def test_findings_name_parameters():
    random = np.random.default_rng(0)
    positions = random.normal(size=(1, 8, 60)) + 1e-3 * random.normal(size=(5, 8, 60))
    positions[:, :, 7] += np.arange(5)[:, None] * random.uniform(1, 2, size=8)
    positions[:, :, 50:53] = 1e-2 * np.arange(5)[:, None, None]
    keys = {"layers/0/bias": (10,), "w": (4, 10), "opt/mu": (3,), "c": (), "e": (2, 3)}
    found = {f.name: f.evidence for f in report(np.float32(positions), keys).diagnose()}
    assert "1 of 60 coordinates (`layers/0/bias[7]`)" in found["few coordinates hold Σ"]
    assert "Coordinates all of `opt/mu`, 3 of 60 are the same" in found["common coordinates"]


def test_a_run_without_names_has_no_shares():
    with pytest.raises(esl.InputError, match="whose parameters have names"):
        report(recording(), None).by_key()


def test_simulated_networks_know_their_parameters():
    data = esl.datasets.two_moons(samples=20)
    potential = esl.FlaxLoss(esl.models.mlp(2, 3, 2), data.train, batch_size=4)
    start = potential.init(members=4, key=jax.random.key(0))
    run = {"steps": 2, "snapshots": 2, "key": jax.random.key(1)}
    path = esl.simulate(potential, esl.Langevin(0.1), start, **run)
    names = [name for name, _ in path.keys]
    assert names == ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel"]
    # The first three numbers of a member are the bias of the first layer.
    model = potential.unravel(jnp.arange(17.0))
    np.testing.assert_array_equal(model.layers[0].bias[...], jnp.arange(3.0))
    assert dict(path.keys)["layers/0/kernel"] == model.layers[0].kernel.shape
    shares = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0).by_key()
    assert abs(sum(share.entropy_production for share in shares) - 1) < 1e-5
    driven = esl.Driven(lambda rate: potential, esl.Linear(0.0, 1.0))
    assert driven.parameter_keys == path.keys
    observed = esl.simulate(potential, esl.Langevin(0.1), start, observe=lambda x: x[:2], **run)
    assert observed.keys is None
    assert esl.simulate(esl.Quadratic(1.0), esl.Langevin(0.1), start, **run).keys is None


def test_several_runs_keep_the_names_that_all_have():
    named, bare = (esl.from_snapshots(recording(), keys=keys) for keys in (KEYS, None))
    both = esl.speed_limit([named, named], transport=esl.ExactTransport())
    assert both.by_key()[0].key == "bias"
    with pytest.raises(esl.InputError, match="whose parameters have names"):
        esl.speed_limit([named, bare], transport=esl.ExactTransport()).by_key()
