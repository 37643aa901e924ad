"""Matched endpoints and judgments, on two moons with a small network."""

import functools
import json
import math

import jax
import numpy as np
import pytest

import esljax as esl
from esljax.experiment import comparison, judging, matching, settings
from esljax.files.writing import write_json, write_toml


@pytest.fixture(scope="module")
def problem():
    data = esl.datasets.two_moons(300)
    potential = esl.FlaxLoss(esl.models.mlp(2, 8, 2), data.train, batch_size=32, l2=1e-4)
    return esl.Problem(
        potential, members=8, steps=20, snapshots=5, temperature=1e-6, test=data.test
    )


def test_table_reads_the_same_rates(problem):
    for shape in esl.usual_shapes().values():
        np.testing.assert_allclose(
            problem.table(shape).rates(20), shape.rates(20), rtol=1e-6, atol=1e-7
        )


def test_run_is_the_simulation_that_it_says(problem):
    """One run, rebuilt from the public pieces."""
    key = jax.random.key(3)
    outcome = problem.run(esl.Constant(0.2), key)
    start_key, path_key = jax.random.split(key)
    start = problem.potential.init(members=8, key=start_key)
    path = esl.simulate(
        problem.potential, esl.Langevin(0.2, 1e-6), start, steps=20, snapshots=5, key=path_key
    )
    losses = [float(problem.potential.energy(member)) for member in path.final]
    np.testing.assert_allclose(outcome.final_loss, np.mean(losses), rtol=1e-5)
    logits = problem.potential.predict(path.final, problem.test.inputs)
    np.testing.assert_allclose(
        outcome.test_accuracy,
        np.mean(np.argmax(logits, -1) == np.asarray(problem.test.labels)),
        rtol=1e-6,
    )


def test_match_endpoint_meets_the_target_on_its_keys(problem):
    keys = jax.random.split(jax.random.key(0), 2)
    target = judging.final_loss(problem, esl.Constant(0.2), keys)
    trials = []
    for name, shape in esl.usual_shapes().items():
        matched = matching.match_endpoint(
            problem,
            shape,
            target=target,
            learning_time=4.0,
            keys=keys,
            name=name,
            watch=trials.append,
        )
        loss = np.mean([problem.run(matched, key).final_loss for key in keys])
        assert abs(loss / target - 1) < 1e-3, name
        # The shape is kept: only its scale moved.
        ratio = np.asarray(matched.values[1:-1]) / np.asarray(problem.table(shape).values[1:-1])
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert len(trials) <= 4 * len(esl.usual_shapes())


def test_unreachable_target_lists_what_was_tried(problem):
    keys = jax.random.split(jax.random.key(0), 1)
    with pytest.raises(
        esl.InputError,
        match="`target` must be a loss that cosine can reach, but is 1e-06: scaling the rates gave",
    ):
        matching.match_endpoint(
            problem, esl.Cosine(1.0), target=1e-6, learning_time=4.0, keys=keys, name="cosine"
        )
    with pytest.raises(esl.InputError, match="positive sum"):
        matching.match_endpoint(
            problem, esl.Constant(0.0), target=0.5, learning_time=4.0, keys=keys
        )


def test_judge_averages_single_runs(problem):
    keys = jax.random.split(jax.random.key(5), 4)
    judgment = judging.judge(problem, esl.Constant(0.2), keys)
    outcomes = [problem.run(esl.Constant(0.2), key) for key in keys]
    gaps = np.array([outcome.report.gap for outcome in outcomes])
    losses = np.array([outcome.final_loss for outcome in outcomes])
    np.testing.assert_allclose(judgment.report.gap, gaps.mean(), rtol=1e-4)
    np.testing.assert_allclose(judgment.report.standard_error.gap, gaps.std(ddof=1) / 2, rtol=1e-3)
    np.testing.assert_allclose(judgment.final_loss, losses.mean(), rtol=1e-5)
    error = judgment.standard_error.final_loss
    np.testing.assert_allclose(error, losses.std(ddof=1) / 2, rtol=1e-3)
    assert judgment.errors == "spread over 4 independent runs"
    with pytest.warns(DeprecationWarning, match=r"Judgment\.standard_error\.final_loss"):
        assert judgment.final_loss_error == error
    with pytest.warns(DeprecationWarning, match=r"Judgment\.standard_error\.test_accuracy"):
        assert judgment.test_accuracy_error == judgment.standard_error.test_accuracy
    with pytest.raises(esl.InputError, match="at least 2"):
        judging.judge(problem, esl.Constant(0.2), keys[:1])


def test_ratio_is_paired(problem):
    """Common keys cancel: the error of the ratio is far below that of two independent judgments."""
    keys = jax.random.split(jax.random.key(6), 6)
    fast, slow = (judging.judge(problem, esl.Constant(rate), keys) for rate in (0.22, 0.2))
    mean, error = judging.ratio(fast, slow)
    ratios = np.asarray(fast.entropy_productions) / np.asarray(slow.entropy_productions)
    np.testing.assert_allclose(mean, ratios.mean(), rtol=1e-6)
    np.testing.assert_allclose(error, ratios.std(ddof=1) / np.sqrt(6), rtol=1e-6)
    spread = (
        np.std(np.asarray(slow.entropy_productions), ddof=1)
        / np.sqrt(6)
        / np.mean(np.asarray(slow.entropy_productions))
    )
    assert error < spread


class Recorder:
    """A watcher that lists what it is called with, and interrupts at one of the stages."""

    def __init__(self, interrupt_at=None):
        self.stages, self.losses, self.iterations, self.judgments = [], [], [], []
        self.interrupt_at = interrupt_at

    def stage(self, name):
        if name == self.interrupt_at:
            raise KeyboardInterrupt
        self.stages.append(name)

    def trial(self, loss):
        self.losses.append(loss)

    def iteration(self, iteration):
        self.iterations.append(iteration)

    def judged(self, judgment):
        self.judgments.append(judgment)


@pytest.fixture(scope="module")
def compared(problem):
    """A function that compares two shapes on the problem."""
    return functools.partial(
        comparison.compare,
        problem,
        rate=0.2,
        key=jax.random.key(4),
        shapes={"constant": esl.Constant(1.0), "cosine": esl.Cosine(1.0)},
        knots=3,
        iterations=3,
        match_runs=1,
        judge_runs=2,
    )


@pytest.fixture(scope="module")
def whole(compared):
    watcher = Recorder()
    return compared(watcher=watcher), watcher


def same(first, second):
    assert first.target == second.target
    assert list(first.judgments) == list(second.judgments)
    for name, judgment in first.judgments.items():
        other = second.judgments[name]
        np.testing.assert_array_equal(judgment.schedule.values, other.schedule.values)
        np.testing.assert_array_equal(judgment.entropy_productions, other.entropy_productions)


def test_a_comparison_is_its_stages(problem, whole):
    """The same numbers by hand, from the public functions and the four keys."""
    result, watcher = whole
    _, match_key, _, judge_key = jax.random.split(jax.random.key(4), 4)
    keys = jax.random.split(match_key, 1)
    assert result.target == judging.final_loss(problem, esl.Constant(0.2), keys)
    cosine = matching.match_endpoint(
        problem, esl.Cosine(1.0), target=result.target, learning_time=4.0, keys=keys
    )
    by_hand = judging.judge(problem, cosine, jax.random.split(judge_key, 2))
    np.testing.assert_array_equal(
        result.judgments["cosine"].entropy_productions, by_hand.entropy_productions
    )
    sigmas = [float(each.report.entropy_production) for each in result.judgments.values()]
    assert sigmas == sorted(sigmas)
    assert set(result.judgments) == {"constant", "cosine", "optimized", "retimed"}
    assert result.best_usual in ("constant", "cosine")
    assert result.optimized is result.judgments["optimized"]
    off = abs(float(result.optimized.final_loss) / result.target - 1)
    assert result.misses_target == (off > 0.01)
    assert watcher.stages == [
        "target",
        "matching constant",
        "matching cosine",
        "matching retimed",
        "optimizing",
        "matching optimized",
        "judging optimized",
        "judging constant",
        "judging cosine",
        "judging retimed",
        "examining optimized",
    ]
    assert [each.iteration for each in watcher.iterations] == [0, 1, 2]
    assert len(watcher.losses) >= 3
    assert len(watcher.judgments) == 4


def test_the_retimed_shape_is_the_first_one_at_constant_speed(problem, whole):
    """By hand, from the run that the first shape was matched on."""
    result, _ = whole
    _, match_key, _, _ = jax.random.split(jax.random.key(4), 4)
    keys = jax.random.split(match_key, 1)
    report = problem.run(result.judgments["constant"].schedule, keys[0]).report
    rates = np.asarray(esl.constant_speed(report).rates(20))
    judged = np.asarray(result.judgments["retimed"].schedule.values[:-1])
    np.testing.assert_allclose(judged / judged.sum(), rates / rates.sum(), rtol=1e-4)
    constant, retimed = (result.judgments[name].report for name in ("constant", "retimed"))
    assert retimed.temporal < constant.temporal / 4
    assert result.left_out == ()


def test_the_optimized_schedule_is_examined_on_its_runs(problem, whole):
    result, _ = whole
    _, _, _, judge_key = jax.random.split(jax.random.key(4), 4)
    keys = jax.random.split(judge_key, 2)
    schedule = result.optimized.schedule
    transport = esl.QuotientTransport(problem.transport, esl.symmetry.of(problem.potential))
    paths = [problem.path(schedule, key) for key in keys]
    squares = [
        float(
            esl.speed_limit(path, transport=transport, jackknife=0, debias=True).debiased_w2_squared
        )
        for path in paths
    ]
    value, error = result.debiased_w2_squared
    np.testing.assert_allclose(value, np.mean(squares), rtol=1e-4)
    np.testing.assert_allclose(error, abs(squares[0] - squares[1]) / 2, rtol=1e-3)
    moved = [np.sum(np.square(path.final - path.positions[0]), axis=1).mean() for path in paths]
    np.testing.assert_allclose(result.bracket.upper, np.mean(moved), rtol=1e-5)
    np.testing.assert_allclose(result.bracket.upper_error, abs(moved[0] - moved[1]) / 2, rtol=1e-3)
    noise = esl.minibatch_noise(
        problem.path(schedule, keys[0]), problem.potential, key=jax.random.key(9), pairs=16
    )
    off = np.hypot(noise.standard_error.floor, result.batches.standard_error.floor)
    assert abs(noise.floor - result.batches.floor) < 5 * off


def test_a_retiming_that_fails_is_left_out_with_its_reason(compared, monkeypatch):
    def refusing(report):
        raise esl.InputError("Argument `report` must move.")

    monkeypatch.setattr(comparison, "constant_speed", refusing)
    result = compared(iterations=1, shapes={"constant": esl.Constant(1.0)})
    assert set(result.judgments) == {"constant", "optimized"}
    assert result.left_out == ("The re-timed schedule is left out: Argument `report` must move.",)


def test_agreement_is_the_chi_squared_of_equal_lengths(whole):
    judgments = whole[0].judgments
    reports = [judgment.report for judgment in judgments.values()]
    lengths = np.array([float(report.length_squared) for report in reports])
    errors = np.array([float(report.standard_error.length_squared) for report in reports])
    fitted = np.polynomial.polynomial.polyfit(np.arange(4), lengths, 0, w=1 / errors)
    same = judging.agreement(judgments)
    np.testing.assert_allclose(same.chi_squared, np.sum(((lengths - fitted) / errors) ** 2))
    np.testing.assert_allclose(same.spread, (lengths.max() - lengths.min()) / fitted[0])
    assert same.freedom == 3


def test_two_registered_shapes_rise_and_are_not_in_common_use(problem):
    shapes = esl.usual_shapes()
    for name in settings.RISING:
        rates = np.asarray(shapes[name].rates(50))
        assert np.all(np.diff(rates) > 0)
        np.testing.assert_allclose(shapes[name](1.0), 1.0)
    np.testing.assert_allclose(float(shapes["linear_rise"](0.0)), 0.2)
    np.testing.assert_allclose(float(shapes["exponential_rise"](0.0)), math.exp(-1.6), rtol=1e-6)
    rise = judging.judge(
        problem, shapes["exponential_rise"], jax.random.split(jax.random.key(0), 2)
    )
    search = esl.optimize(lambda x, key: x**2, 1.0, key=jax.random.key(0), iterations=1)
    one = comparison.Comparison(0.1, 1.0, {"exponential_rise": rise, "cosine": rise}, search)
    assert (one.best_usual, one.best_rising) == ("cosine", "exponential_rise")


def test_an_interrupted_judging_keeps_what_was_judged(compared, whole):
    result = compared(watcher=Recorder("judging constant"))
    assert list(result.judgments) == ["optimized"]
    assert result.optimum.interrupted
    assert result.best_usual is None
    assert not whole[0].optimum.interrupted
    with pytest.raises(KeyboardInterrupt):
        compared(watcher=Recorder("judging optimized"))


@pytest.mark.parametrize("stage", ["matching cosine", "matching optimized"])
def test_a_resumed_comparison_has_the_same_bits(compared, whole, tmp_path, stage):
    with pytest.raises(KeyboardInterrupt):
        compared(watcher=Recorder(stage), checkpoints=esl.Checkpoints(tmp_path, every=0))
    watcher = Recorder()
    resume = esl.Checkpoints(tmp_path, resume=True, every=0)
    same(compared(watcher=watcher, checkpoints=resume), whole[0])
    assert "target" not in watcher.stages
    assert "matching constant" not in watcher.stages
    assert len(watcher.iterations) == (3 if stage == "matching cosine" else 0)
    with pytest.raises(esl.InputError, match=r"rate is 0\.2, not 0\.3"):
        compared(rate=0.3, checkpoints=resume)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rate": -1.0}, "`rate` must be greater than 0"),
        ({"rate": 1e30}, "`rate` must leave the constant schedule stable"),
        ({"key": 3}, "`key` must be made by"),
        ({"target": 0.0}, "`target` must be greater than 0"),
        ({"knots": 1}, "`knots` must be an integer of at least 2"),
        ({"judge_runs": 1}, "`judge_runs` must be an integer of at least 2"),
        ({"shapes": {}}, "`shapes` must hold at least one schedule.*, but holds none"),
        ({"shapes": {"optimized": esl.Constant(1.0)}}, "`shapes` .* none named 'optimized'"),
        ({"shapes": {"retimed": esl.Constant(1.0)}}, "`shapes` .* or 'retimed', but"),
    ],
    ids=str,
)
def test_bad_comparisons_are_rejected(compared, refused, arguments, sentence):
    refused(lambda: compared(**arguments), sentence)


def test_an_unknown_transport_is_rejected():
    with pytest.raises(
        esl.InputError, match=r"`transport` must be one of 'exact', .*, but is 'l1'"
    ):
        settings.make_transport("l1", 1.0, 1, 0, jax.random.key(0))


def test_files_are_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")], "z": math.pi})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "x": None,
        "y": [1.5, None],
        "z": math.pi,
    }
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert "null" in (tmp_path / "a.json").read_text(), "the old file stays"
    write_toml(tmp_path / "b.toml", {"a": 1, "b": None})
    assert (tmp_path / "b.toml").read_text().endswith("\na = 1\n")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "b.toml"}


def bend(time):
    """The loss of a run at some learning time: it falls, and rises where the run is unstable."""
    return 0.3 + 0.7 / (1 + time) + max(0.0, time - 8) ** 2


@pytest.mark.parametrize("start", [1e-3, 0.1, 1.0, 5.0, 8.0, 12.0, 1e3, 1e200])
@pytest.mark.parametrize("target", [0.9, 0.6, 0.4])
def test_a_target_is_found_from_any_start(start, target, problem, monkeypatch):
    """On the branch where the loss falls with the scale, also from beyond it."""
    steps = problem.steps

    def loss(problem, table, keys):
        time = float(table.values[0]) * steps
        return bend(time) if time < 1e3 else np.nan

    monkeypatch.setattr(matching, "final_loss", loss)
    start = min(start, 3e37)  # the largest number of single precision
    found = matching.match_endpoint(
        problem, esl.Constant(1.0), target=target, learning_time=start, keys=jax.random.key(0)[None]
    )
    time = float(found.values[0]) * steps
    assert abs(bend(time) / target - 1) < 1.1e-3
    assert time < 8
    with pytest.raises(esl.InputError, match="must be a loss that shape can reach"):
        matching.match_endpoint(
            problem,
            esl.Constant(1.0),
            target=0.2,
            learning_time=start,
            keys=jax.random.key(0)[None],
        )


@pytest.mark.parametrize("gap", [0.005, 0.02])
def test_a_loss_that_jumps_over_the_target_is_met_nearly(gap, problem, monkeypatch):
    """Within ten tolerances where none is closer; else it is refused."""

    def loss(problem, table, keys):
        time = float(table.values[0]) * problem.steps
        return 0.5 * (1 + gap) + 0.1 / (1 + time) if time < 4 else 0.4 - 0.001 * time

    # From far below: the least loss before the jump is 0.5 (1 + gap) + .02.
    monkeypatch.setattr(matching, "final_loss", loss)

    def match(target):
        return matching.match_endpoint(
            problem,
            esl.Constant(1.0),
            target=target,
            learning_time=1.0,
            keys=jax.random.key(0)[None],
        )

    target = 0.5 + 0.02
    if gap < 0.01:
        time = float(match(target).values[0]) * problem.steps
        assert 1e-3 < abs(loss(problem, match(target), None) / target - 1) < 1e-2
        assert time < 4
    else:
        with pytest.raises(esl.InputError, match="must be a loss that shape can reach"):
            match(target)


def test_a_shape_that_cannot_reach_the_target_is_left_out(problem, tmp_path):
    shapes = {
        "one step": esl.Piecewise([1.0, 1e-9], [0.03]),
        "constant": esl.Constant(1.0),
        "linear": esl.Linear(1.0, 0.5),
    }
    settings = {"key": jax.random.key(0), "rate": 0.2, "iterations": 2, "judge_runs": 2}
    result = esl.compare(
        problem, shapes=shapes, checkpoints=esl.Checkpoints(tmp_path, every=0.0), **settings
    )
    assert set(result.judgments) == {"constant", "linear", "retimed", "optimized"}
    (why,) = result.left_out
    assert why == f"No scale of one step reaches the loss {result.target:.4g}: it is left out."
    assert why in str(result)
    again = esl.compare(
        problem, shapes=shapes, checkpoints=esl.Checkpoints(tmp_path, resume=True), **settings
    )
    assert again.left_out == result.left_out
    with pytest.raises(esl.InputError, match="must be a loss that one step can reach"):
        esl.compare(problem, shapes={"one step": shapes["one step"]}, **settings)


def test_the_closest_scale_is_none_beyond_the_least_loss():
    """The nearest loss of all stands where the run is no longer stable."""
    trials = {-1.0: 0.9, 0.0: 0.52, 1.0: 0.503, 2.0: 0.5, 3.0: np.nan, 4.0: np.inf}
    assert matching._closest({**trials, 1.5: 0.4}, 0.5) == (1.0, 0.503)
    assert matching._closest({3.0: np.nan, 4.0: np.inf, 1.0: 0.7}, 0.5) == (1.0, 0.7)


def test_an_optimized_schedule_that_cannot_be_matched_is_judged_as_it_is(problem, monkeypatch):
    plain = matching.match_endpoint

    def not_the_optimized(problem, shape, *, name, **more):
        if name == "optimized":
            raise esl.InputError("out of reach")
        return plain(problem, shape, name=name, **more)

    monkeypatch.setattr(matching, "match_endpoint", not_the_optimized)
    result = esl.compare(
        problem,
        key=jax.random.key(0),
        shapes={"constant": esl.Constant(1.0)},
        rate=0.2,
        iterations=2,
        judge_runs=2,
    )
    assert result.optimized is not None
    assert "The optimized schedule is judged as it is: out of reach" in str(result)
