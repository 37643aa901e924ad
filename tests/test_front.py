"""The front of loss and Σ, on a quadratic whose front is known without sampling."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.experiment import Family, bounded, fronts, searching, unbounded
from esljax.experiment.comparison import Unwatched
from esljax.experiment.families import scaled
from esljax.experiment.fronts import Front, raggedness
from esljax.experiment.judging import Judgment
from esljax.results import StandardErrors

KEY = jax.random.key(1)


@pytest.fixture(scope="module")
def problem():
    """θ²/2 + 3/2 from N(3, 1), without noise: every member is multiplied by the same f."""
    return esl.Problem(
        esl.FromFunction(lambda x: jnp.sum(x**2) / 2 + 1.5),
        members=16,
        steps=20,
        snapshots=10,
        transport=esl.GaussianTransport(),
        start=lambda key: 3 + jax.random.normal(key, (16, 1)),
    )


@pytest.fixture(scope="module")
def found(problem):
    families = {"constant": Family(unbounded, lambda x, cap: esl.Constant(bounded(x, cap)))}
    return esl.front(
        problem, key=KEY, points=3, knots=4, families=families, iterations=40, judge_runs=4
    )


def test_points_trade_loss_for_sigma(found):
    assert np.all(np.diff(found.final_loss) < 0)
    assert np.all(np.diff(found.entropy_production) > 0)
    assert np.all(found.w2_squared <= found.entropy_production * (1 + 1e-6))


def test_the_front_is_the_limit_of_a_quadratic(found):
    """At constant speed Σ = W2² = 10 (1-f)² and the loss is 3/2 + 5 f², so λ = 5 f (1-f)/loss."""
    slopes = found.slopes
    f = (5 - np.sqrt(25 - 4 * (5 + 5 * slopes) * 1.5 * slopes)) / (2 * (5 + 5 * slopes))
    errors = found.standard_error
    # Four runs of 16 members do not know their own errors to better than a half; four knots and
    # twenty steps miss constant speed by a percent.
    loss, sigma = 1.5 + 5 * f**2, 10 * (1 - f) ** 2
    assert np.all(np.abs(found.final_loss - loss) < 8 * errors.final_loss + 0.01 * loss)
    missed = np.abs(found.entropy_production - sigma)
    assert np.all(missed < 8 * errors.entropy_production + 0.02 * sigma)
    assert np.all(found.entropy_production < 1.02 * found.w2_squared)
    share, error = found.share(found.families["constant"])
    assert share < 1 - 3 * error


def test_slopes_are_slopes(found):
    """d log loss / d log Σ = -λ between the points, within the span of their slopes."""
    between = -np.diff(np.log(found.final_loss)) / np.diff(np.log(found.entropy_production))
    assert np.all(between < found.slopes[:-1] * 1.5)
    assert np.all(between > found.slopes[1:] / 1.5)


def test_a_front_that_is_nowhere_so_steep_has_losses_instead(monkeypatch):
    """With a floor of 5 no minimum of log loss + .42 log Σ exists: doing nothing is better."""
    flat = esl.Problem(
        esl.FromFunction(lambda x: jnp.sum(x**2) / 2 + 5),
        members=8,
        steps=10,
        snapshots=10,
        transport=esl.GaussianTransport(),
        start=lambda key: 3 + jax.random.normal(key, (8, 1)),
    )
    settings: Any = {"key": KEY, "knots": 2, "families": {}, "rate": 0.2, "judge_runs": 2}
    # Losses instead, from the square root of 9.5 times 5 down to 5, of 8 members a run.
    found = esl.front(flat, points=2, iterations=20, **settings)
    assert found.doubts[-1].startswith("Slopes of 0.42 to 0.14 have no minimum here")
    np.testing.assert_allclose(found.final_loss, [np.sqrt(9.5 * 5), 5], rtol=0.1)
    # A probe of constant rates may be wrong, and then the search says what it found.
    monkeypatch.setattr(fronts, "losses_to_reach", lambda *_: None)
    found = esl.front(flat, points=1, iterations=80, **settings)
    assert found.doubts[0].startswith("Point 1 of front hardly trains (its loss is ")
    assert found.doubts[0] in str(found)


@pytest.mark.parametrize(
    ("trade", "has_slopes"),
    [
        # 1/loss = 1 + Σ: as steep as -1 far from the start, and flat at it.
        pytest.param(lambda rate: 1 / (1 + 100 * rate), True, id="steep"),
        # At the limit of rates the loss is still as steep, and beyond it rises: no minimum.
        pytest.param(lambda rate: 1 / (1 + 100 * rate) if rate <= 1 else 9.0, False, id="limited"),
        # A floor that is reached before the limit.
        pytest.param(lambda rate: 0.1 + 1 / (1 + 100 * rate), True, id="floor"),
        # Nowhere steep.
        pytest.param(lambda rate: 1 / (1 + 100 * rate) ** 0.4, False, id="flat"),
        pytest.param(lambda rate: 1 / (1 + 100 * rate) if rate <= 1 else np.nan, False, id="nan"),
        pytest.param(
            lambda rate: 1 / (1 + 100 * rate) ** 0.4 if rate > 0.01 else -1.0, False, id="below 0"
        ),
        pytest.param(lambda _: -1.0, True, id="all below 0"),
    ],
)
def test_slopes_are_taken_where_constant_rates_show_a_minimum(
    problem, monkeypatch, trade, has_slopes
):
    """Σ is the rate here, and the loss is given."""

    def outcome_of(problem, table, key):
        rate = float(table.values[0])
        return SimpleNamespace(
            final_loss=trade(rate), report=SimpleNamespace(entropy_production=rate)
        )

    monkeypatch.setattr(searching, "outcome_of", outcome_of)
    targets = searching.losses_to_reach(problem, 1.0, 1.0, 3, KEY, Unwatched())
    if has_slopes:
        assert targets is None
    else:
        best = trade(1.0)
        np.testing.assert_allclose(targets, np.geomspace(np.sqrt(best), best, 3), rtol=1e-6)


@pytest.mark.parametrize("targets", [None, [2.5, 1.8]])
@pytest.mark.parametrize("gives_way", [False, True])
def test_a_front_starts_again_from_a_better_family_or_gives_way_to_it(
    problem, monkeypatch, gives_way, targets
):
    """Searches of knots take two gradients here: what is good comes from the family."""
    plain = searching.gradients

    def few(iterations, *, first, made):
        return 2 if made else plain(iterations, first=first, made=made)

    monkeypatch.setattr(searching, "gradients", few)
    if gives_way:
        # The search from the family is lost: it starts where the rate falls a hundredfold.
        lost = unbounded(jnp.array([1.0, 0.01]), 4.0)
        monkeypatch.setattr(searching, "fitted", lambda *_: lost)
    settings: Any = {"key": KEY, "points": 2, "knots": 2, "judge_runs": 2, "iterations": 40}
    # Nearly constant speed, and better than what two gradients from a constant find.
    families = {"tuned": scaled(lambda peak: esl.Knots(jnp.array([0.3, 1.0]) * peak))}
    found = esl.front(problem, families=families, targets=targets, **settings)
    tuned = found.families["tuned"]
    if gives_way:
        assert all(f"Point {p} of front is that of tuned" in str(found) for p in (1, 2))
        np.testing.assert_array_equal(found.entropy_production, tuned.entropy_production)
        np.testing.assert_array_equal(found.final_loss, tuned.final_loss)
    else:
        # Two knots are the same schedule, and two gradients do little to it.
        better = np.log(found.final_loss) + tuned.slopes * np.log(found.entropy_production)
        worse = np.log(tuned.final_loss) + tuned.slopes * np.log(tuned.entropy_production)
        assert np.all(better < worse + 1e-3)


def test_it_prints_draws_and_is_saved(found, tmp_path):
    text = str(found)
    assert found.verdict() in text
    assert "constant, at its best" in text
    assert len(found.plot().axes) == 2
    found.save(tmp_path)
    content = json.loads((tmp_path / "front.json").read_text())
    np.testing.assert_allclose(content["final_loss"], found.final_loss)
    np.testing.assert_allclose(
        content["families"]["constant"]["entropy_production"],
        found.families["constant"].entropy_production,
    )
    again = esl.load_schedule(tmp_path / "schedules" / "point_2.json")
    np.testing.assert_array_equal(again.rates(20), found.schedules[2].rates(20))
    assert (tmp_path / "front.png").read_bytes()[:4] == b"\x89PNG"


def test_a_resumed_front_has_the_same_bits(problem, tmp_path):
    class Stop(Exception):
        pass

    class Recorder:
        def __init__(self, until=""):
            self.until, self.stages = until, []

        def stage(self, name):
            if name == self.until:
                raise Stop
            self.stages.append(name)

        def trial(self, loss): ...
        def iteration(self, iteration): ...
        def judged(self, judgment): ...

    settings = {"key": KEY, "points": 3, "knots": 2, "families": {}, "iterations": 3}
    whole = esl.front(problem, **settings)
    saved = esl.Checkpoints(tmp_path, every=0)
    with pytest.raises(Stop):
        esl.front(problem, watcher=Recorder("front 3/3"), checkpoints=saved, **settings)
    watcher = Recorder()
    resumed = esl.front(
        problem,
        watcher=watcher,
        checkpoints=esl.Checkpoints(tmp_path, every=0, resume=True),
        **settings,
    )
    assert "front 2/3" not in watcher.stages
    assert "front 3/3" in watcher.stages
    np.testing.assert_array_equal(whole.final_loss, resumed.final_loss)
    assert whole.doubts == resumed.doubts


def test_other_families_of_the_same_names_do_not_finish_a_front(problem, tmp_path):
    class Stop(Exception):
        pass

    class Stopping:
        def stage(self, name):
            if name == "front 2/2":
                raise Stop

        def trial(self, loss): ...
        def iteration(self, iteration): ...
        def judged(self, judgment): ...

    def of(shape):
        return {"mine": Family(unbounded, lambda x, cap: shape(bounded(x, cap)))}

    settings = {"key": KEY, "points": 2, "knots": 2, "iterations": 2, "rate": 0.5}
    saved = esl.Checkpoints(tmp_path, every=0)
    with pytest.raises(Stop):
        esl.front(
            problem, watcher=Stopping(), checkpoints=saved, families=of(esl.Cosine), **settings
        )
    resumed = esl.Checkpoints(tmp_path, every=0, resume=True)
    with pytest.raises(esl.InputError, match="families"):
        esl.front(problem, checkpoints=resumed, families=of(esl.Constant), **settings)


def test_targets_are_met(problem):
    found = esl.front(
        problem, key=KEY, knots=3, families={}, targets=[2.0, 1.6], iterations=20, judge_runs=8
    )
    errors = found.standard_error.final_loss
    assert np.all(np.abs(found.final_loss - [2.0, 1.6]) < 5 * errors + 0.01)


def made(losses, sigmas, families=None):
    def judgment(loss, sigma):
        report = esl.speed_limit(
            esl.from_snapshots(jnp.stack([jnp.zeros((4, 1)), jnp.full((4, 1), sigma**0.5)])),
            transport=esl.GaussianTransport(),
        )
        return Judgment(
            schedule=esl.Knots([0.1, 0.1]),
            report=report,
            final_loss=jnp.asarray(loss),
            metrics={},
            standard_error=StandardErrors({"final_loss": jnp.asarray(0.0)}),
            errors="none",
            entropy_productions=jnp.full(2, sigma),
            final_losses=jnp.full(2, loss),
        )

    return Front(
        np.geomspace(0.42, 0.14, len(losses)),
        tuple(judgment(*pair) for pair in zip(losses, sigmas, strict=True)),
        (esl.Knots([0.1, 0.1]),) * len(losses),
        0.1,
        0.4,
        families or {},
    )


def test_the_knee_is_where_loss_gets_dear():
    bent = made([1.0, 0.5, 0.45, 0.44], [1.0, 1.1, 4.0, 16.0])
    assert bent.knee == 1
    assert bent.verdict().startswith("13.6 % more loss (0.5 for 0.44) saves a factor 14.5 of Σ")


def test_shares_are_taken_at_equal_losses():
    line = made([1.0, 0.5], [1.0, 4.0])  # Σ = 1/loss²
    np.testing.assert_allclose(line.entropy_production_at(0.8), 0.8**-2, rtol=1e-6)
    other = made([0.9, 0.6, 0.4], [2 * 0.9**-2, 2 * 0.6**-2, 3.0])
    np.testing.assert_allclose(line.share(other)[0], 0.5, rtol=1e-5)
    assert line.share(made([0.3, 0.2], [1.0, 2.0])) is None


def test_the_error_of_a_share_is_that_of_paired_runs():
    """Runs that scatter alike in both fronts leave the ratio as it is."""

    def scattered(scale, noise):
        points = made([1.0, 0.5], [scale, 4.0 * scale])
        judgments = tuple(
            dataclasses.replace(
                each,
                entropy_productions=each.report.entropy_production * jnp.exp(jnp.array(noise)),
                final_losses=jnp.full(3, each.final_loss),
            )
            for each in points.judgments
        )
        return dataclasses.replace(points, judgments=judgments)

    noise = [-0.1, 0.02, 0.08]
    share, error = scattered(1.0, noise).share(scattered(2.0, noise))
    np.testing.assert_allclose(share, 0.5, rtol=1e-5)
    np.testing.assert_allclose(error, 0, atol=1e-5)
    error = scattered(1.0, noise).share(scattered(2.0, [0.0] * 3))[1]
    expected = np.std(0.5 * np.exp(noise), ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(error, expected, rtol=1e-4)


def test_losses_below_zero_are_refused(refused):
    below = esl.Problem(
        esl.FromFunction(lambda x: jnp.sum(x**2) - 9),
        members=4,
        steps=10,
        snapshots=5,
        start=jnp.ones((4, 2)),
    )
    refused(lambda: esl.front(below, key=KEY, rate=0.1), "`problem` must have losses above 0")


def test_raggedness_is_what_one_rise_and_one_fall_do_not_explain():
    smooth = esl.Knots([0.1, 0.4, 0.2])
    np.testing.assert_allclose(raggedness(smooth, 200), 0, atol=0.02)
    ragged = esl.Knots([0.4, 0.1, 0.4, 0.1], "log-linear")
    np.testing.assert_allclose(raggedness(ragged, 300), 2 * np.log(4), atol=0.05)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"points": 0}, "`points` must be an integer of at least 1"),
        ({"targets": [0.5, 0.8]}, "`targets` must be final losses above 0, from high to low"),
        ({"families": {"mine": esl.Constant(0.1)}}, r"`families\['mine'\]` must be a Family"),
        ({"rate": -1.0}, "`rate` must be greater than 0"),
        ({"key": 0}, "`key` must be made by"),
    ],
)
def test_bad_fronts_are_refused(problem, refused, settings, sentence):
    refused(lambda: esl.front(problem, **{"key": KEY, **settings}), sentence)


@pytest.mark.slow
def test_the_front_of_particles_is_the_exact_front():
    """A noisy quadratic, whose front `esl.gaussian.front` finds without sampling."""
    spectrum = 1 / jnp.arange(1.0, 7.0)
    hill = esl.Quadratic(spectrum, gradient_noise=0.02 * spectrum)
    law = esl.gaussian.Independent(2 * jnp.ones(6), 0.05 * jnp.ones(6))
    steps, members = 20, 256
    problem = esl.Problem(
        hill,
        members=members,
        steps=steps,
        snapshots=steps,
        transport=esl.GaussianTransport(),
        start=lambda key: 2 + jnp.sqrt(0.05) * jax.random.normal(key, (members, 6)),
    )
    # The loss falls 500 times, so the first point is far from where it starts.
    found = esl.front(problem, key=KEY, points=3, knots=5, families={}, iterations=120)
    exact = esl.gaussian.front(
        law, hill, steps=steps, weights=found.slopes, knots=5, largest_rate=found.cap
    )
    assert bool(exact.converged.all())
    errors: Any = found.standard_error
    for p, slope in enumerate(found.slopes):
        run = esl.gaussian.descent(law, hill, esl.Langevin(found.schedules[p]), steps=steps)
        # What particles measure is what the law of their schedule has.
        for name in ("final_loss", "entropy_production"):
            ours, spread = getattr(found, name)[p], getattr(errors, name)[p]
            # Moments of 256 members in 6 dimensions have a bias of the order d/n.
            bias = 6 / members * float(getattr(run, name))
            assert abs(ours - float(getattr(run, name))) < 4 * spread + bias
        # And the schedule is nearly as good as the best there is.
        value = float(jnp.log(run.final_loss) + slope * jnp.log(run.entropy_production))
        best = float(jnp.log(exact.final_loss[p]) + slope * jnp.log(exact.entropy_production[p]))
        assert best - 1e-4 < value < best + 0.01


def test_a_gradient_that_is_not_finite_sends_the_search_part_of_the_way_back(problem, monkeypatch):
    calls, plain = [], searching._gradient

    def sometimes(*given):
        calls.append(given[1])
        gradient, loss = plain(*given)
        return (gradient * jnp.nan if len(calls) % 4 == 0 else gradient), loss

    monkeypatch.setattr(searching, "_gradient", sometimes)
    found = esl.front(
        problem, key=KEY, points=1, knots=3, families={}, iterations=8, judge_runs=2, rate=0.05
    )
    assert len(calls) == 12
    (doubt,) = [doubt for doubt in found.doubts if "left the stable range" in doubt]
    assert "25% of its gradients were not finite" in doubt
    # It starts at a constant rate, where nothing moves it but the gradients and the way back.
    start, before, after = (np.log(np.asarray(calls[i])) for i in (0, 3, 4))
    assert np.all(np.abs(after - start) < np.abs(before - start))
    assert np.all(np.isfinite(found.final_loss))


def test_what_cannot_reach_a_target_has_fewer_points(problem, monkeypatch):
    plain = searching.match_endpoint

    def up_to_two(problem, shape, *, target, name, **more):
        if name == "shy" and target < 2:
            raise esl.InputError("out of reach")
        return plain(problem, shape, target=target, name=name, **more)

    monkeypatch.setattr(searching, "match_endpoint", up_to_two)
    settings: Any = {"key": KEY, "knots": 3, "iterations": 10, "judge_runs": 2}
    settings["families"] = {"shy": Family(unbounded, lambda x, cap: esl.Constant(bounded(x, cap)))}
    found = esl.front(problem, targets=[3.0, 1.6], **settings)
    assert len(found.schedules) == 2
    shy = found.families["shy"]
    assert len(shy.schedules) == len(shy.slopes) == len(shy.final_loss) == 1
    assert (
        "Point 2 of shy is left out: no scale of its schedule reaches the loss 1.6." in shy.doubts
    )
    assert "Point 2 of shy is left out" in str(found)
    alone = esl.front(problem, targets=[1.6], **settings)
    assert not alone.families
    assert "shy is left out: it reaches none of the targets." in str(alone)
    settings["families"] = {}
    monkeypatch.setattr(fronts, "_MADE", "shy")
    with pytest.raises(esl.InputError, match="be losses that shy can reach"):
        esl.front(problem, targets=[1.6], **settings)
