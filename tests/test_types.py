"""Arrays, counts and settings of other people at the public doors: the right number, or one
sentence."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import esljax as esl

pytestmark = pytest.mark.usefixtures("quick_compilation", "without_annotations")

KEY = jax.random.key(0)
CLOUD = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
# Exact in 16 bits, so that a right answer does not depend on the type.
CLOUD = np.round(CLOUD * 8) / 8
LABELS = np.arange(8) % 2
TRAP = esl.Quadratic(1.0)


def simulated(positions=CLOUD, **settings):
    settings = {"steps": 4, "snapshots": 2, "key": KEY, **settings}
    return esl.simulate(TRAP, esl.Langevin(0.1), positions, **settings)


def loss(inputs):
    potential = esl.FlaxLoss(esl.models.mlp(2, 2), (inputs, LABELS))
    return potential.energy(jnp.arange(6, dtype=jnp.float32) / 6)


@pytest.fixture
def without_annotations(request):
    """A run that checks annotations stops types from outside before a door can take them."""
    if request.config.getoption("jaxtyping_packages", None):
        pytest.skip("annotations are checked in this run")


# Each door is a function of one ensemble, or of what is laid out like one.
DOORS = {
    "simulate": lambda x: simulated(x).final,
    "from_snapshots": lambda x: esl.from_snapshots(np.ma.stack([x, x])).positions,
    "transport": lambda x: esl.GaussianTransport().squared(x, CLOUD + 1),
    "velocity": lambda x: esl.AffineVelocity()(x, -CLOUD, 1.0).squared,
    "entropy": lambda x: esl.density.GaussianEntropy()(x).value,
    "density": lambda x: esl.density.GaussianDensity().fit(x).log_density(jnp.zeros(2)),
    "directions": lambda x: esl.principal_directions(x, 1),
    "loss": loss,
    "knots": lambda x: esl.Knots(np.ma.abs(x[:, 0]) + 1).values,
    "potential": lambda x: esl.Quadratic(1.0, x[0])(jnp.zeros(2)),
    "law": lambda x: esl.gaussian.Law(x[0], np.eye(2)).mean,
}


def on_disk(x, folder):
    np.save(folder / "cloud.npy", x)
    return np.load(folder / "cloud.npy", mmap_mode="r")


TYPES = {
    "big-endian": lambda x, folder: x.astype(">f4"),
    "double of the other order": lambda x, folder: x.astype(">f8"),
    "Fortran order": lambda x, folder: np.asfortranarray(x),
    "mapped and read-only": on_disk,
    "half": lambda x, folder: x.astype(np.float16),
    "bfloat16": lambda x, folder: x.astype(ml_dtypes.bfloat16),
    "extended": lambda x, folder: x.astype(np.longdouble),
    "nothing masked": lambda x, folder: np.ma.masked_array(x, mask=False),
    "of jax, half": lambda x, folder: jnp.asarray(x, jnp.float16),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_type_gives_one_number_or_a_sentence(door, tmp_path, request):
    if request.config.getoption("jaxtyping_packages", None) and door == "potential":
        pytest.skip("annotations do not know arrays of NumPy there")
    function = DOORS[door]
    expected = np.asarray(function(CLOUD))
    assert expected.dtype == np.float32
    for name, made in TYPES.items():
        answer = np.asarray(function(made(CLOUD, tmp_path)))
        assert answer.dtype == np.float32, name
        np.testing.assert_allclose(answer, expected, rtol=2e-6, atol=2e-6, err_msg=name)
    for wrong, reason in [
        (np.ma.masked_array(CLOUD, mask=CLOUD[0, 0] == CLOUD), "masked"),
        (CLOUD.astype(complex), "real numbers|complex"),
    ]:
        if reason != "masked" and door in ("loss", "knots"):  # complex inputs; their absolutes
            continue
        with pytest.raises(esl.InputError, match=reason):
            function(wrong)


@pytest.mark.parametrize("count", [np.int64, np.array, jnp.asarray])
def test_counts_of_numpy_are_counts(count):
    same = simulated().final
    np.testing.assert_array_equal(simulated(steps=count(4), snapshots=count(2)).final, same)
    path = simulated()
    for transport in (esl.ExactTransport(), esl.SlicedTransport(count(2), KEY)):
        esl.speed_limit(path, transport=transport, jackknife=count(2))
    assert esl.random_directions(count(3), count(2), KEY).shape == (3, 2)
    potential = esl.FlaxLoss(esl.models.mlp(2, 2), (CLOUD, LABELS), batch_size=count(4))
    assert potential.init(members=count(2), key=KEY).shape == (2, 6)
    assert type(potential.batch_size) is int
    assert esl.SinkhornTransport(0.1, max_iterations=count(50)).max_iterations == 50
    with pytest.raises(esl.InputError, match="`steps` must be an integer of at least 1"):
        simulated(steps=np.float64(4.0))


SETTINGS = {
    "jax_numpy_rank_promotion": "raise",
    "jax_numpy_dtype_promotion": "strict",
    "jax_debug_nans": True,
    "jax_default_matmul_precision": "bfloat16",
}


def measured():
    path = esl.simulate(
        TRAP, esl.Langevin(esl.Knots([0.1, 0.2]), 0.01), CLOUD, steps=4, snapshots=2, key=KEY
    )
    report = esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=2)
    entropy = esl.free_energy(path, TRAP, entropy=esl.density.GaussianEntropy())
    velocity = esl.AffineVelocity()(CLOUD, -CLOUD, 1.0)
    slope = jax.grad(
        lambda rate: jnp.sum(
            esl.simulate(TRAP, esl.Langevin(rate), CLOUD, steps=2, snapshots=1, key=KEY).final ** 2
        )
    )(0.1)
    return [report.entropy_production, entropy.free_energy, velocity.squared, slope, loss(CLOUD)]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_jax_change_no_number(name):
    expected = measured()
    before = getattr(jax.config, name)
    jax.config.update(name, SETTINGS[name])
    try:
        answers = measured()
    finally:
        jax.config.update(name, before)
    for answer, right in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer, right, rtol=1e-5)
