"""Networks that compute in bfloat16: what is rounded, what is not, and what it does to Σ. A CPU
emulates the rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.potentials.datasets import digits

KEY = jax.random.key(0)


def network(dtype):
    return esl.FlaxLoss(
        esl.potentials.mlp(64, 32, 10), digits().train, batch_size=256, l2=1e-4, dtype=dtype
    )


def measured(potential, start):
    path = esl.simulate(
        potential, esl.Langevin(esl.Cosine(0.5), 1e-7), start, steps=100, snapshots=10, key=KEY
    )
    return path, esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0)


# Allowed to keep more digits than requested, the compiler of a CPU leaves out most of the rounding.
emulated = jax.jit(measured, compiler_options={"xla_allow_excess_precision": False})


def test_sigma_hardly_feels_it():
    """A network rounded to 8 bits moves its members by what a thousandth of the error over seeds
    would not show."""
    start = network(None).init(members=16, key=KEY)
    (path, report), (rounded, other) = (
        emulated(network(None), start),
        emulated(network("bfloat16"), start),
    )
    assert (
        rounded.positions.dtype
        == rounded.energies.dtype
        == other.entropy_production.dtype
        == jnp.float32
    )
    # The rounding is there: a relative 2⁻⁹ in every number, which members feel one by one.
    moved = float(jnp.max(jnp.abs(rounded.final - path.final)))
    assert 1e-5 < moved < 1e-1
    for name in ("entropy_production", "length_squared", "w2_squared"):
        assert abs(float(getattr(other, name) / getattr(report, name)) - 1) < 5e-4
    np.testing.assert_allclose(rounded.energies, path.energies, rtol=0.02)


def test_the_model_alone_multiplies_in_it():
    start = network(None).init(members=4, key=KEY)
    text = jax.jit(measured).lower(network("bfloat16"), start).as_text()
    products = [
        re.findall(r": \((.*?)\) -> (.*)", line)[-1]
        for line in text.splitlines()
        if "dot_general" in line
    ]
    inside = [shapes for shapes in products if "bf16" in shapes[0]]
    assert len(inside) >= 4  # two layers, forward and backward
    assert all(
        "bf16" in first and not re.search(r"x(bf16)>, tensor<[\dx]*xf32", first)
        for first, _ in inside
    )
    assert re.search(r"tensor<11x4x2410xf32>", text)


def test_gradients_are_widened():
    position = network(None).init(members=1, key=KEY)[0]
    wide, narrow = (network(dtype).energy_and_gradient(position) for dtype in (None, "bfloat16"))
    assert narrow[0].dtype == narrow[1].dtype == jnp.float32
    assert network("bfloat16").predict(position, digits().test.inputs[:2]).dtype == jnp.float32
    assert 0 < float(jnp.linalg.norm(narrow[1] - wide[1]) / jnp.linalg.norm(wide[1])) < 0.02


@pytest.mark.parametrize("dtype", ["int32", 3])
def test_bad_input_is_one_sentence(dtype, refused):
    refused(lambda: network(dtype), "`dtype` must be a floating type such as 'bfloat16'")
