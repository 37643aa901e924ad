"""Schedules that leave: as optax schedules, as code, as files and in print."""

import errno
import functools
import json
import os
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_schedules import OPTAX, SCHEDULES, every

import esljax as esl
from esljax.experiment import SCHEDULES as REGISTRY

STEPS = 49


class Wave(esl.AbstractSchedule):
    """A user's own: arrays, a whole number, a text and a schedule within."""

    mean: jax.Array
    within: esl.AbstractSchedule
    periods: int = 2
    phase: float = 0.25
    label: str = "wave"
    more: float | None = None

    def __call__(self, s):
        return self.mean * self.within(s) * (2 + jnp.sin(self.periods * s + self.phase))


class Own(esl.AbstractSchedule):
    """A user's own with a constructor that does not take its field as it is."""

    rate: jax.Array

    def __init__(self, rate):
        self.rate = 2 * jnp.asarray(rate)

    def __call__(self, s):
        return self.rate * s


class Holder(esl.AbstractSchedule):
    """A user's own with a field that no file can hold."""

    fn: object

    def __call__(self, s):
        return jnp.asarray(s)


# --- optax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every
def test_an_optax_schedule_is_the_rates_to_the_bit(name, dtype, precision_restored):
    jax.config.update("jax_enable_x64", dtype == "float64")
    schedule = SCHEDULES[name][0]()
    for steps in (1, STEPS):
        rates = np.asarray(schedule.rates(steps))
        fn = schedule.to_optax(steps)
        counts = jnp.arange(steps)
        assert fn(counts).dtype == dtype
        np.testing.assert_array_equal(fn(counts), rates)
        np.testing.assert_array_equal(esl.FromOptax(fn).rates(steps), rates)
        end = schedule(1.0)
        assert end == fn(steps) == fn(steps + 10) == esl.FromOptax(fn, steps)(1.0)
        np.testing.assert_allclose(fn(0.3 * steps), schedule(0.3), rtol=1e-6)
    # Compiled, the formula itself would be fused, and off by 3e-6 of the last linear rate.
    compiled = jax.jit(lambda count: schedule.to_optax(STEPS)(count))
    np.testing.assert_array_equal(compiled(counts), rates)


def test_an_optax_schedule_returns_to_itself():
    for given in (None, 25, 40):
        fn = esl.FromOptax(OPTAX, given).to_optax(20)
        for count in range(20):
            np.testing.assert_allclose(fn(count), OPTAX(count * (given or 20) / 20), rtol=1e-6)


def test_an_optimizer_of_optax_steps_by_the_rates():
    schedule = esl.Knots([0.1, 0.4, 0.2])
    optimizer = optax.sgd(schedule.to_optax(7))

    def step(state, _):
        update, state = optimizer.update(jnp.ones(()), state)
        return state, -update

    _, moves = jax.lax.scan(step, optimizer.init(jnp.ones(())), None, 9)
    np.testing.assert_array_equal(moves[:7], schedule.rates(7))
    np.testing.assert_array_equal(moves[7:], schedule(1.0))


@pytest.mark.parametrize("name", ["cosine", "warmup", "log-linear knots"])
def test_the_gradient_goes_through_an_optax_schedule(name, x64):
    """In the leaves of a traced schedule, and in the count, at whole counts and others."""
    schedule = SCHEDULES[name][0]()
    weights = jnp.linspace(-1, 2, 10)

    def read(schedule):
        return jnp.dot(weights, jax.vmap(schedule.to_optax(10))(jnp.arange(10)))

    found = jax.jit(jax.grad(read))(schedule)
    truth = jax.grad(lambda schedule: jnp.dot(weights, schedule.rates(10)))(schedule)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)
    for count in (4.0, 4.3):
        slope = jax.grad(schedule.to_optax(10))(count)
        difference = oracles.central_difference(schedule, count / 10, 1.0)
        np.testing.assert_allclose(slope, difference / 10, rtol=1e-6)


@every
def test_schedules_leave_under_strict_settings(name, tmp_path):
    """A training loop may have set jax to promote nothing; counts may be NumPy's."""
    schedule = SCHEDULES[name][0]()
    rates = np.asarray(schedule.rates(4))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(schedule.rates(np.int64(4)), rates)
        fn = schedule.to_optax(np.int32(4))
        for count in (2, np.int64(2), jnp.asarray(2), jnp.asarray(2, jnp.uint8), 2.0):
            assert fn(count) == rates[2]
        assert schedule.to_optax(400)(jnp.asarray(200, jnp.uint8)) == rates[2]
        fn(jnp.asarray(2.5))
        assert str(esl.Warmup(schedule, 0.5)).startswith("Warmup: from 0 over 0.5")
        assert "rates = " in schedule.to_code(steps=np.int64(4))
        schedule.save(tmp_path / "schedule.json")
        back = esl.load_schedule(tmp_path / "schedule.json")
        if name != "optax":
            np.testing.assert_array_equal(back.rates(4), rates)
        np.testing.assert_array_equal(esl.Knots.from_rates(rates).rates(4), rates)


# --- Code -----------------------------------------------------------------------------------------


class LambdaLR:
    """What PyTorch's does: the first rate at once, one more at every step."""

    def __init__(self, optimizer, lr_lambda):
        self.groups, self.lr_lambda, self.epoch = optimizer.param_groups, lr_lambda, -1
        self.base = [group.setdefault("initial_lr", group["lr"]) for group in self.groups]
        self.step()

    def step(self):
        self.epoch += 1
        for group, base in zip(self.groups, self.base, strict=True):
            group["lr"] = base * self.lr_lambda(self.epoch)


@pytest.fixture
def torch(monkeypatch):
    """PyTorch where it is installed, else a module with the one class that the code calls."""
    try:
        import torch
    except ModuleNotFoundError:
        scheduler = types.SimpleNamespace(LambdaLR=LambdaLR)
        module = types.ModuleType("torch")
        module.optim = types.SimpleNamespace(lr_scheduler=scheduler)
        monkeypatch.setitem(sys.modules, "torch", module)
        groups = [{"lr": 0.3}, {"lr": 0.1}]
        return types.SimpleNamespace(param_groups=groups, step=lambda: None)
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every
def test_code_has_the_rates(name, dtype, torch, precision_restored):
    jax.config.update("jax_enable_x64", dtype == "float64")
    schedule = SCHEDULES[name][0]()
    for steps in (1, STEPS):
        truth = [*np.asarray(schedule.rates(steps)), schedule(1.0), schedule(1.0)]
        close = functools.partial(np.testing.assert_allclose, desired=truth, rtol=1e-7)
        pasted = {}
        exec(schedule.to_code("optax", steps), pasted)
        close(pasted["schedule"](jnp.arange(steps + 2)))
        close([pasted["schedule"](count) for count in range(steps + 2)])
        assert isinstance(pasted["optimizer"], optax.GradientTransformation)

        pasted = {"optimizer": torch}
        exec(schedule.to_code("pytorch", steps), pasted)
        found = []
        for _ in range(steps + 2):
            found.append([group["lr"] for group in torch.param_groups])
            torch.step()
            pasted["scheduler"].step()
        close(np.array(found)[:, 0])
        close(np.array(found)[:, -1])


# --- Files ----------------------------------------------------------------------------------------


def same(one, other):
    """Whether two schedules are equal to the bit, dtypes and static parts included."""
    (ones, first), (others, second) = jax.tree.flatten(one), jax.tree.flatten(other)
    return first == second and all(
        np.asarray(a).dtype == np.asarray(b).dtype
        and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every
def test_a_saved_schedule_comes_back_to_the_bit(name, dtype, x64, tmp_path):
    scale = np.random.default_rng(0)
    schedule = jax.tree.map(
        lambda x: jnp.asarray(x * scale.uniform(0.9, 1, x.shape), dtype), SCHEDULES[name][0]()
    )
    schedule.save(tmp_path / "new folder" / "schedule.json")
    back = esl.load_schedule(str(tmp_path / "new folder" / "schedule.json"))
    assert same(esl.schedules.from_dict(schedule.as_dict()), back)
    if name == "optax":  # a file holds no function
        assert back.interpolation == "linear"
        np.testing.assert_array_equal(back.rates(25), schedule.rates(25))
        assert back(1.0) == schedule(1.0)
        return
    assert same(back, schedule)
    assert type(back) is type(schedule)
    assert not same(back, jax.tree.map(lambda x: x + x / 64, schedule))


def test_extreme_numbers_come_back_to_the_bit(tmp_path):
    numbers = np.array([0.0, -0.0, 1e-45, 1.2e-38, 3.4028235e38, 1 / 3, 16777217.0], np.float32)
    for schedule in (
        esl.Knots(numbers, "linear"),
        esl.Knots.from_rates([0.0]),
        esl.Constant(0.0),
        jax.tree.map(lambda x: x - 200, esl.Knots([0.1, 0.4])),  # its values underflow
        esl.Warmup(esl.Warmup(esl.Knots([0.1, 0.4]), 0.3), 1 / 3),
    ):
        schedule.save(tmp_path / "schedule.json")
        assert same(esl.load_schedule(tmp_path / "schedule.json"), schedule)


def test_an_own_schedule_comes_back_where_its_class_is_given(tmp_path, refused):
    path = tmp_path / "wave.json"
    wave = Wave(jnp.asarray(0.1), esl.Warmup(esl.Cosine(0.3), 0.2))
    wave.save(path)
    assert same(esl.load_schedule(path, kinds=[Wave]), wave)
    refused(
        lambda: esl.load_schedule(path),
        r"wave\.json is of the kind \S+\.Wave, which is unknown \(give kinds=\[Wave\]\)",
    )
    refused(lambda: esl.load_schedule(path, kinds=[dict]), "`kinds` must hold your own classes")
    warm = esl.Warmup(wave, 0.2)
    assert same(esl.schedules.from_dict(warm.as_dict(), kinds=[Wave]), warm)


def test_an_own_class_does_not_stand_for_one_of_ours():
    class Cosine(esl.AbstractSchedule):
        shape: esl.AbstractSchedule

        def __call__(self, s):
            return self.shape(s)

    mine = Cosine(esl.Cosine(0.1))
    back = esl.schedules.from_dict(mine.as_dict(), kinds=[Cosine])
    assert same(back, mine)
    assert type(back.shape) is esl.Cosine


def test_a_schedule_of_optax_within_another_is_saved_as_its_table():
    warm = esl.Warmup(esl.FromOptax(OPTAX, 25), 0.5)
    back = esl.schedules.from_dict(warm.as_dict())
    np.testing.assert_allclose(back.rates(50), warm.rates(50), rtol=1e-6)


def test_single_and_double_precision(tmp_path, refused, precision_restored):
    path = tmp_path / "schedule.json"
    jax.config.update("jax_enable_x64", True)
    esl.Constant(1 / 3).save(path)
    jax.config.update("jax_enable_x64", False)
    refused(lambda: esl.load_schedule(path), r"float64 numbers, which jax keeps only with jax_ena")
    assert esl.load_schedule(path, dtype="float32")(0.0) == np.float32(1 / 3)
    refused(lambda: esl.load_schedule(path, dtype="int8"), "`dtype` must be one of 'float16'")


def test_files_written_by_hand():
    assert same(
        esl.schedules.from_dict({"kind": "Linear", "start": 1, "end": 0.5}), esl.Linear(1, 0.5)
    )
    edited = esl.Knots([0.5, 0.25]).as_dict()
    del edited["log_values"]
    np.testing.assert_allclose(esl.schedules.from_dict(edited).values, [0.5, 0.25], rtol=1e-6)


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path, monkeypatch, refused):
    path = tmp_path / "schedule.json"
    esl.Constant(0.25).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused(lambda: esl.Constant(0.5).save(path), "can be written, but .* gives: No space left")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]


KNOTS = {"kind": "Knots", "dtype": "float32", "interpolation": "linear", "values": [0.1, 0.2]}
DAMAGED = [
    ("", "is no valid JSON"),
    ('{"kind": "Constant", "val', "is no valid JSON"),
    (b"\xff\xfe\x00", "is no text"),
    ("[" * 100_000, "is no valid JSON"),
    ("[]", "holds a list"),
    ("null", "holds None"),
    ("{}", "is of the kind None, which is unknown"),
    ({"kind": "Sawtooth"}, "is of the kind Sawtooth, which is unknown .known: Constant, Linear"),
    ({"kind": ["Constant"]}, "is of the kind .'Constant'., which is unknown"),
    ({"kind": "FromOptax"}, "is of the kind FromOptax, which is unknown"),
    ({"kind": "Constant"}, "is no valid Constant: `value` is missing"),
    ({"kind": "Constant", "value": 1, "rate": 2}, "is no valid Constant: it has no `rate`"),
    ({"kind": "Constant", "value": "fast"}, "is no valid Constant"),
    ({"kind": "Constant", "value": None, "dtype": "float32"}, "has a `value` that is not made of"),
    ({"kind": "Constant", "value": None}, "is no valid Constant"),
    ({"kind": "Constant", "value": True, "dtype": "float32"}, "has a `value` that is not made of"),
    (
        {"kind": "Constant", "value": [0.1, 0.2], "dtype": "float32"},
        r"is no valid Constant: (it gives the shape \(2,\)|Type-che)",
    ),
    ({"kind": "Constant", "value": {"kind": "Constant", "value": 1}}, "is no valid Constant"),
    ('{"kind": "Constant", "value": NaN}', "is no valid JSON .NaN is no number"),
    ('{"kind": "Constant", "value": 1e999}', "is no valid JSON .1e999 is no number"),
    ('{"kind": "Constant", "dtype": "float32", "value": 1e99}', "has a `value` too large for flo"),
    ({"kind": "Constant", "dtype": "float32", "value": 10**400}, "`value` that is no array"),
    ({"kind": "Constant", "dtype": "int32", "value": 1}, "has the unknown dtype 'int32'"),
    ({"kind": "Constant", "dtype": 3, "value": 1}, "has as `dtype` an int"),
    ({"kind": "Exponential", "start": -1, "end": 1}, "`start` must be greater than 0, but is -1"),
    ({"kind": "Warmup", "shape": {"kind": "Cosine"}}, "in `shape` is no valid Cosine: `peak` is"),
    ({"kind": "Warmup", "shape": {}}, "in `shape` is of the kind None"),
    ({**KNOTS, "values": [0.1]}, "is no valid Knots: Argument `values` must have shape"),
    ({**KNOTS, "values": [[0.1], [0.2, 0.3]]}, "has a `values` that is no array of numbers"),
    ({**KNOTS, "interpolation": "cubic"}, "`interpolation` must be one of|: Type-check"),
    ({**KNOTS, "log_values": [0.1, 0.2]}, "`log_values` are not those of `values`"),
    (
        {**KNOTS, "interpolation": "log-linear", "log_values": [-2.3025851, -1.2]},
        "`values` are not those of `log_values`",
    ),
]


@pytest.mark.parametrize(("content", "sentence"), DAMAGED)
def test_a_damaged_file_is_one_sentence(content, sentence, tmp_path, refused):
    path = tmp_path / "schedule.json"
    text = json.dumps(content) if isinstance(content, dict) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(
        lambda: esl.load_schedule(path),
        rf"`path` must hold a schedule that `save` wrote, but .*schedule\.json .*({sentence})",
    )
    if isinstance(content, dict):
        refused(lambda: esl.schedules.from_dict(content), sentence)


def test_files_that_cannot_be_read_or_written(tmp_path, refused):
    cosine = esl.Cosine(0.1)
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    readable = "`path` must be a readable file, but .* "
    refused(lambda: esl.load_schedule(tmp_path / "none.json"), readable + "gives: No such file")
    refused(lambda: esl.load_schedule(tmp_path), readable + "is a folder")
    refused(lambda: esl.load_schedule(tmp_path / "pipe"), readable + "is a pipe")
    refused(lambda: esl.load_schedule(3), "`path` must be the path of a file, but is an int")
    replaced = "`path` must be where nothing but results of esljax is replaced, but .* is there, a "
    refused(lambda: cosine.save(tmp_path), replaced + "folder")
    (tmp_path / "other.json").write_text('{"rate": 0.1}')
    refused(lambda: cosine.save(tmp_path / "other.json"), replaced + "file")
    (tmp_path / "link").symlink_to("other.json")
    refused(lambda: cosine.save(tmp_path / "link"), replaced + "link")
    refused(lambda: cosine.save("a\0b"), "`path` must be a")
    refused(lambda: esl.load_schedule("a\0b"), "`path` must ")
    assert (tmp_path / "other.json").read_text() == '{"rate": 0.1}'
    cosine.save(tmp_path / "file")  # empty, as `tempfile` leaves one
    refused(lambda: cosine.save(tmp_path / "file" / "x.json"), "`path` must be a folder that can")
    refused(lambda: cosine.save(3), "`path` must be the path of a file, but is an int")


# --- What cannot leave ----------------------------------------------------------------------------


def stacked():
    """Two schedules, as `vmap` takes them."""
    return jax.tree.map(lambda x: jnp.stack([x, 2 * x]), esl.Cosine(0.1))


UNFIT = {
    "stacked": (stacked, r"must give one number at each time .* gives the shape \(2,\)"),
    "stacked knots": (
        lambda: jax.tree.map(lambda x: jnp.stack([x, x]), esl.Knots([0.1, 0.2, 0.3])),
        r"must give one number at each time .* gives the shape \(3,\)",
    ),
    "not finite": (lambda: esl.Constant(np.nan), "`schedule` must be finite"),
    "infinite": (lambda: esl.Linear(1.0, np.inf), "`schedule` must be finite"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_schedule_is_refused(name, tmp_path, refused):
    make, sentence = UNFIT[name]
    schedule = make()
    refused(lambda: schedule.save(tmp_path / "x.json"), sentence)
    refused(lambda: schedule.to_code(steps=4), sentence)
    if name.startswith("stacked"):
        refused(lambda: schedule.to_optax(4), sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap])
def test_a_traced_schedule_is_refused(transform, tmp_path, refused):
    sentence = "`schedule` must have known numbers to leave, outside of jit, .*, but is traced"
    for way in (lambda one: one.save(tmp_path / "x.json"), lambda one: one.to_code(steps=4)):
        schedule = stacked() if transform is jax.vmap else esl.Cosine(0.1)

        def leave(one, way=way):
            way(one)
            return one(0.0)

        refused(lambda leave=leave, schedule=schedule: transform(leave)(schedule), sentence)
    assert list(tmp_path.iterdir()) == []


def test_schedules_that_no_file_can_hold(tmp_path, refused):
    def save(schedule):
        return lambda: schedule.save(tmp_path / "x.json")

    advice = r"Knots\.from_rates\(schedule\.rates\(steps\)\)"
    refused(save(Own(1.0)), rf"must come back from its fields .*{advice}.*an Own, which does not")
    refused(save(Holder(len)), rf"must have fields of numbers.*{advice}.*`fn` the function len")
    refused(save(esl.FromOptax(OPTAX)), r"a number of steps to be saved .*FromOptax\(fn, steps\)")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: esl.Cosine(1.0).to_optax(0), "`steps` must be an integer of at least 1, but is 0"),
        (lambda: esl.Cosine(1.0).to_code("keras", 3), "`library` must be one of 'optax', 'pyto"),
        (lambda: esl.Cosine(1.0).to_code(), "`steps` must be the number of steps of the run"),
        (lambda: esl.Cosine(1.0).to_code("optax", 1.5), "`steps` must be an integer of at least 1"),
        (lambda: esl.schedules.from_dict(3), "`content` must be what .* returns, but it holds an"),
    ],
)
def test_bad_arguments_are_one_sentence(call, sentence, refused):
    refused(call, sentence)


# --- Print ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "printed"),
    [
        (lambda: esl.Constant(0.25), "Constant: 0.25"),
        (lambda: esl.Linear(1, 0), "Linear: start 1, end 0"),
        (lambda: esl.Exponential(1 / 3, 1e-5), "Exponential: start 0.3333, end 1e-05"),
        (
            lambda: esl.WarmupStableDecay(0.5),
            "WarmupStableDecay: peak 0.5, warmup 0.1, decay 0.2, start 0, end 0, "
            "decay_shape linear",
        ),
        (
            lambda: esl.Knots([0.17, 0.2, 0.04]),
            "Knots: 3 log-linear knots from 0.17 to 0.04: 0.17 0.2 0.04",
        ),
        (
            lambda: esl.Knots(np.linspace(1, 0, 101), "linear"),
            "Knots: 101 linear knots from 1 to 0: "
            "1 0.99 0.98 0.97 0.96 0.95 0.94 0.93 … 0.07 0.06 0.05 0.04 0.03 0.02 0.01 0",
        ),
        (
            lambda: esl.Piecewise([1, 0.1], [0.5]),
            "Piecewise: 1 to s = 0.5, 0.1 to the end",
        ),
        (
            lambda: esl.Warmup(esl.Cosine(0.4)),
            "Warmup: from 0 over 0.1 of the run, then Cosine: peak 0.4, end 0",
        ),
        (
            lambda: esl.FromOptax(optax.linear_schedule(1.0, 0.5, 4), 4),
            "FromOptax: the function schedule, over 4 steps from 1 to 0.5",
        ),
        (lambda: esl.FromOptax(lambda k: k), "FromOptax: a function, over the steps of the run"),
        (stacked, "Cosine: peak 0.1 0.2, end 0 0"),
    ],
)
def test_print(make, printed):
    assert str(make()) == printed


def test_a_traced_schedule_prints():
    printed = []
    jax.jit(lambda one: printed.append(str(one)) or one(0.0))(esl.Knots([0.1, 0.2]))
    jax.jit(lambda one: printed.append(str(one)) or one(0.0))(esl.Piecewise([0.1, 0.2], [0.5]))
    assert printed == [
        "Knots: log-linear knots, parameters an unknown array of shape (2,)",
        "Piecewise: values an unknown array of shape (2,), boundaries (0.5,)",
    ]


def test_the_page_has_every_name_of_a_shape():
    """One spelling: the names of settings, of classes and in print."""
    page = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `esl\.(\w+)\((.*?)\)` \| `(.*?)` \|$", page, re.MULTILINE)
    assert {name for name, *_ in rows} == set(REGISTRY)
    for name, kind, arguments, printed in rows:
        schedule = REGISTRY[name]()
        numbers = [float(number) for number in arguments.split(",")]
        written = getattr(esl, kind)(*numbers)
        assert str(schedule) == str(written) == printed
        np.testing.assert_allclose(written.rates(5), schedule.rates(5), rtol=1e-4)
