"""First tries of a newcomer at each public door: one sentence that names what to use instead."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import esljax as esl

KEY = jax.random.key(0)
START = np.ones((4, 2), np.float32)
DATA = (np.ones((6, 4), np.float32), np.arange(6) % 3)
DECAY = optax.cosine_decay_schedule(0.1, 100)
TRAP = esl.Quadratic(1.0)


class Tensor:
    """As a PyTorch tensor that requires a gradient."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


def fitted():
    return jnp.ones(2)


def run(potential=TRAP, rule=None, positions=START, **settings):
    rule = esl.Langevin(0.1, 0.1) if rule is None else rule
    return esl.simulate(potential, rule, positions, steps=4, snapshots=2, key=KEY, **settings)


def energy(position):
    return jnp.sum(position**2)


SCHEDULE = r" must be a number or a schedule, such as .*Knots\(values\).*FromOptax\(fn\).*, but is "
POTENTIAL = r"` must be a potential such as Quadratic\(1.0\), or FromFunction\(fn\) .*, but is "
RULE = r"`rule` must be a rule such as Langevin\(learning_rate, temperature\), but is "
MODEL = r"`model` must be a Flax module .*FromFunction\(fn\) of the raveled parameters\), but "
EXAMPLES = r"`data` must be two arrays \(inputs .*, such as digits\(\).train, but is "
TRIES = {
    # Schedules
    "an optax schedule": (
        lambda: esl.Langevin(DECAY),
        "`learning_rate`" + SCHEDULE + "the function schedule",
    ),
    "the name of a schedule": (lambda: esl.Langevin("cosine"), SCHEDULE + "'cosine'"),
    "an optax temperature": (lambda: esl.Langevin(0.1, DECAY), "`temperature`" + SCHEDULE),
    "a word for a number": (lambda: esl.Constant("fast"), "`value` must be a number or an array"),
    "a table for a number": (lambda: esl.Cosine({"peak": 1.0}), "must be a number or an array"),
    "a word for a stiffness": (lambda: esl.Quadratic("stiff"), "must be a number or an array"),
    "a named temperature": (
        lambda: esl.Langevin(0.1, temperature="cosine"),
        "`temperature`" + SCHEDULE,
    ),
    "a schedule replaced": (
        lambda: esl.Langevin(0.1).replace(learning_rate=DECAY),
        "`learning_rate`" + SCHEDULE,
    ),
    "an optax rate of a flow": (
        lambda: esl.ProbabilityFlow(DECAY, 0.1, esl.AffineVelocity()),
        "`learning_rate`" + SCHEDULE,
    ),
    "an optax drive": (lambda: esl.Driven(esl.Quadratic, DECAY), "`drive`" + SCHEDULE),
    "a named drive": (lambda: esl.Driven(esl.Quadratic, drive="linear"), "`drive`" + SCHEDULE),
    "a class of schedules": (lambda: esl.Langevin(esl.Cosine), SCHEDULE + "the class Cosine"),
    "a list of rates": (lambda: esl.Langevin([0.1, 0.2]), SCHEDULE + "a list"),
    "a dictionary": (lambda: esl.Langevin({"peak": 0.1}), SCHEDULE + "a dict"),
    "an array of rates": (
        lambda: run(rule=esl.Langevin(np.ones(4))),
        r"`learning_rate` must be one number at each training time \(Knots\(values\)",
    ),
    "a schedule of ours in FromOptax": (
        lambda: esl.FromOptax(esl.Cosine(0.1)),
        "`fn` must be optax's function of a count of steps, but is Cosine",
    ),
    # Ensembles
    "parameters in a dictionary": (
        lambda: run(positions={"w": START}),
        r"`positions` must be an array \(n, d\), .*jax.flatten_util.ravel_pytree, but is a dict",
    ),
    "parameters in a module": (
        lambda: run(positions=eqx.nn.Linear(2, 2, key=KEY)),
        r"jax.flatten_util.ravel_pytree, but is ",
    ),
    "no parameters": (lambda: run(positions=None), "ravel_pytree, but is None"),
    "rows of unequal length": (
        lambda: run(positions=[[1.0, 2.0], [3.0]]),
        r"`positions` must be an array of shape \(n, d\), with rows of one length, but is a list",
    ),
    "a tensor": (
        lambda: run(positions=Tensor()),
        r"`positions` must be an array, as x.detach\(\).cpu\(\).numpy\(\) makes .*is a Tensor",
    ),
    "integers": (
        lambda: run(positions=np.ones((4, 2), int)),
        r"`positions` must hold floating-point numbers, as x.astype\(float\) makes .* has "
        r"dtype int",
    ),
    "one member": (
        lambda: run(positions=np.ones(3, np.float32)),
        r"`positions` must have shape \(n, d\), one row per member, but has shape \(3,\)",
    ),
    # Potentials
    "a function": (lambda: run(energy), "`potential" + POTENTIAL + "the function energy"),
    "a lambda": (lambda: run(lambda x: jnp.sum(x)), "`potential" + POTENTIAL + "a function"),
    "a class of potentials": (
        lambda: run(esl.Quadratic),
        "`potential" + POTENTIAL + "the class Quadratic",
    ),
    "a function measured": (
        lambda: esl.free_energy(run(), energy, entropy=esl.density.GaussianEntropy()),
        "`potential" + POTENTIAL + "the function energy",
    ),
    "a function beside a velocity": (
        lambda: esl.speed_limit(
            run(),
            transport=esl.GaussianTransport(),
            velocity=esl.AffineVelocity(),
            potential=energy,
        ),
        "`potential" + POTENTIAL + "the function energy",
    ),
    "batches of a function": (
        lambda: esl.minibatch_noise(run(), energy, key=KEY),
        "`potential" + POTENTIAL + "the function energy",
    ),
    "the memory of a function": (
        lambda: esl.plan_memory(energy, START, steps=4, snapshots=2),
        "`potential" + POTENTIAL + "the function energy",
    ),
    "a family of energies": (
        lambda: esl.Driven(lambda drive: energy, 1.0),
        r"`family\(drive\)" + POTENTIAL + "the function energy",
    ),
    # Rules
    "a class of rules": (lambda: run(rule=esl.Langevin), RULE + "the class Langevin"),
    "a transport for a rule": (lambda: run(rule=esl.ExactTransport()), RULE + "an ExactTransport"),
    "an optimizer": (lambda: run(rule=optax.sgd(0.1)), RULE + "a "),
    "a class of gradients": (
        lambda: run(gradient=esl.Autodiff),
        r"`gradient` must be HessianAdjoint\(\), .*, but is the class Autodiff",
    ),
    # Networks
    "a model of equinox": (
        lambda: esl.FlaxLoss(eqx.nn.MLP(4, 3, 5, 1, key=KEY), DATA),
        MODEL + "is a MLP",
    ),
    "a forward function": (
        lambda: esl.FlaxLoss(lambda parameters, x: parameters @ x, DATA),
        MODEL + "fails on rngs: .*missing 1 required positional argument",
    ),
    "a function of nothing": (lambda: esl.FlaxLoss(fitted, DATA), MODEL + "fails on rngs"),
    "both splits": (
        lambda: esl.FlaxLoss(esl.models.mlp(64, 10), esl.datasets.digits()),
        EXAMPLES + "a Dataset of 2 parts",
    ),
    "inputs alone": (
        lambda: esl.FlaxLoss(esl.models.mlp(4, 3), DATA[0]),
        EXAMPLES,
    ),
}


@pytest.mark.parametrize("name", TRIES)
def test_a_first_try_is_answered_in_one_sentence(name, refused):
    call, sentence = TRIES[name]
    refused(call, sentence)
