"""Data, models and losses of the user's own, by the settings that name them."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import esljax as esl
from esljax.experiment import make_problem
from esljax.files import read_examples

SMALL = {"members": 4, "steps": 4, "snapshots": 2, "batch_size": 0, "hidden": (3,)}
# Ten rows of two kinds, with a quoted comma, a semicolon in a name, and a column that is constant.
ROWS = [(0.5 * i, 7.0, 10.0 - i**2, ("red, dry", "white")[i % 2]) for i in range(10)]
TABLE = "acid,one,sugar,kind\n" + "".join(f'{a},{b},{c},"{d}"\n' for a, b, c, d in ROWS)
# A file of the user's, whose line of each mistake the tests name.
MODELS = """
import jax.numpy as jnp
from flax import linen, nnx


class Net(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.layer = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Dense(linen.Module):
    outputs: int

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.outputs)(x)


def by_place(p, c):
    return lambda rngs: Net(p, c, rngs=rngs)


def hidden(inputs, outputs, hidden, rngs):
    return nnx.Sequential(Net(inputs, hidden[0], rngs=rngs), Net(hidden[0], outputs, rngs=rngs))


def instance(inputs, outputs):
    return Net(inputs, outputs, rngs=nnx.Rngs(0))


def tokens(vocabulary, outputs, rngs):
    return nnx.Sequential(
        nnx.Embed(vocabulary, 2, rngs=rngs), lambda x: x.sum(axis=1), Net(2, outputs, rngs=rngs)
    )


def missing(inputs, outputs):
    return undefined(inputs)


class Wrong(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.layer = nnx.Linear(inputs + 1, outputs, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def nothing(inputs, outputs):
    return 3


def deeper(inputs, outputs, depth):
    return Dense(outputs)


def absolute(outputs, labels):
    return jnp.abs(outputs[:, 0] - labels)


def whole(outputs, labels):
    return jnp.mean(outputs)


number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a table, arrays and a file of models."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text(TABLE)
    (tmp_path / "net.py").write_text(MODELS)
    random = np.random.default_rng(0)
    inputs = random.normal(size=(20, 3))
    np.savez("classes.npz", inputs=inputs, labels=np.where(inputs[:, 0] > 0, 5, -5))
    np.savez("numbers.npz", inputs=inputs, labels=inputs[:, :2] * 9.0)
    return tmp_path


def problem(**settings):
    config = esl.RunConfig(**{**SMALL, **settings})
    return make_problem(config.check(), esl.ExactTransport())


# --- Files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
def test_a_table_is_read_whatever_separates_it(here, separator, start):
    rows = [[str(a), str(b), str(c), f'"{d}"'] for a, b, c, d in ROWS]
    lines = [separator.join(row) for row in [["acid", "one", "sugar", "kind"], *rows]]
    (here / "t.csv").write_text(start + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    stored = read_examples("t.csv", "kind")
    np.testing.assert_array_equal(stored.inputs, [row[:3] for row in ROWS])
    assert stored.labels.tolist() == [row[3] for row in ROWS]


def test_columns_of_a_table_are_standardized_over_the_training_split(here):
    data = esl.datasets.read("mine.csv", "kind")
    # The documented shuffle holds a fifth out.
    order = np.random.default_rng(0).permutation(10)
    raw = np.array([row[:3:2] for row in ROWS])[order]
    mean, spread = raw[2:].mean(axis=0), raw[2:].std(axis=0)
    for split, rows in ((data.test, slice(None, 2)), (data.train, slice(2, None))):
        np.testing.assert_allclose(split.inputs[:, ::2], ((raw - mean) / spread)[rows], 1e-5)
        np.testing.assert_array_equal(split.inputs[:, 1], 0)
        kinds = [ROWS[i][3] for i in order[rows]]
        assert split.labels.tolist() == [kind == "white" for kind in kinds]
    assert data.classes == 2
    prices = esl.datasets.read(write(here, "a,b,price\n1,0,100.5\n2,1,300\n4,0,200\n"), "price")
    prices = np.asarray(prices.train.labels)
    np.testing.assert_allclose([prices.mean(), prices.std()], [0, 1], atol=1e-6)


def test_large_numbers_keep_their_digits(here):
    rows = "".join(f"{1e9 + i},{i}.5\n" for i in range(10))
    data = esl.datasets.read(write(here, f"second,y\n{rows}"), "y")
    np.testing.assert_allclose(data.train.inputs[:, 0], data.train.labels, rtol=1e-5)


def test_arrays_are_used_as_they_are(here):
    random = np.random.default_rng(1)
    parts = {
        "inputs": random.normal(5, 3, size=(7, 2, 2)).astype(np.float32),
        "labels": np.array(["b", "a", "c", "a", "b", "c", "a"]),
        "test_inputs": np.ones((2, 2, 2)),
        "test_labels": np.array(["d", "a"]),
    }
    np.savez("all.npz", **parts)
    data = esl.datasets.read("all.npz")
    np.testing.assert_array_equal(data.train.inputs, parts["inputs"])
    assert data.train.labels.tolist() == [1, 0, 2, 0, 1, 2, 0]
    assert data.test.labels.tolist() == [3, 0]
    assert data.classes == 4


@pytest.mark.parametrize(
    ("labels", "given", "classes"),
    [
        ([-1, 1, 1, -1], None, [0, 1, 1, 0]),
        ([0.5, 2.0, 3.0, 2.0], None, None),
        ([3.0, 1.0, 1.0, 3.0], True, [1, 0, 0, 1]),
        ([3, 1, 1, 3], False, None),
        ([True, False, True, True], None, [1, 0, 1, 1]),
    ],
)
def test_integers_are_classes_and_floating_numbers_are_not(here, labels, given, classes):
    inputs = np.zeros((4, 1))
    np.savez("a.npz", inputs=inputs, labels=labels, test_inputs=inputs, test_labels=labels)
    data = esl.datasets.read("a.npz", classes=given)
    assert data.classes == (None if classes is None else 2)
    np.testing.assert_array_equal(data.test.labels, labels if classes is None else classes)


def write(folder, content, name="t.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "`data` must be a table with a row of names, but t.csv is empty"),
        ("\ufeff\n \n", "`data` must be a table with a row of names, but t.csv is empty"),
        ("y\n1\n2\n", "`data` must have several columns, .* t.csv has one, 'y'"),
        ("a,y\n", "`data` must have a row for each example below its names, but t.csv has none"),
        ("1,2\n3,4\n", "`data` must begin with a row of names .* first row of t.csv holds numbers"),
        ("a,b\n1,2\n", "`label` must be a column of t.csv, one of 'a', 'b', but is 'y'"),
        (",a,y\n0,1,2\n", "`data` must have a name for each column .* column 1 of t.csv has none"),
        ("a,a,y\n0,1,2\n", "`data` must name each column once, but t.csv has 'a' twice"),
        ("a,y\n1,2\n\n1,2,3\n", "have 2 cells in each row, .* but line 4 of t.csv has 3"),
        ("a,y\n1,2\n1\n", "have 2 cells in each row, .* but line 3 of t.csv has 1"),
        ("a,y\n1,2\n,2\n", r"a number in each cell .* 'a' of t.csv is empty in line 3"),
        ("a,y\n1,2\nNaN,2\n", "a number in each cell .* 'a' of t.csv holds 'NaN' in line 3"),
        ("a,y\n1,2\n3,\n", "a number in each cell .* 'y' of t.csv is empty in line 3"),
        ("a,y\n1,2.5\n3,inf\n", "a number in each cell .* 'y' of t.csv holds 'inf' in line 3"),
        ("a,y\n1,2\nred,2\n", "columns of numbers beside the label .* holds 'red' in line 3"),
        ("a;y\n1;2\n1,5;2\n", "numbers with a decimal point, .* holds '1,5' in line 3"),
        ("a,y\n1_0,2\n", "columns of numbers .* holds '1_0' in line 2"),
        ("a,y\n1,2\n2,big\n", "all numbers or all text, .* '2' in line 2 and 'big' in line 3"),
        ('a,y\n1,2\n"2,3\n', "a table whose quotes close, but line 3 of t.csv is not"),
        ("a,y\n1,caf\u00e9\n".encode("latin-1"), "be text in UTF-8 .* t.csv is not"),
        ("a,y\n1,x\n2,x\n3,x\n", "labels of two classes or more, but t.csv has one, x"),
        ("a,y\n1,0\n2,1\n", "have 3 examples or more, but t.csv has 2"),
    ],
)
def test_a_wrong_table_is_one_sentence_with_its_line(here, content, sentence, refused):
    write(here, content)
    refused(lambda: esl.datasets.read("t.csv", "y"), sentence)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": [[1.0]], "y": [1]}, "hold `inputs` and `labels`, .* holds `x`, `y` and no `inputs`"),
        ({"inputs": [[1.0]], "label": [1]}, "holds `label`: is that `labels`"),
        (
            {"inputs": [[1.0]], "labels": [1], "test_inputs": [[1.0]]},
            "holds `inputs`, `labels`, `test_inputs` and no `test_labels`",
        ),
        ({"inputs": [1.0, 2.0], "labels": [1, 2]}, "`inputs` of shape .* has shape"),
        ({"inputs": [[1.0], [2.0]], "labels": [1]}, r"one row of `labels` for each of `inputs`"),
        ({"inputs": [["a"]], "labels": [1]}, "have real numbers in `inputs`, .* has text"),
        ({"inputs": [[1j]], "labels": [1]}, "have real numbers in `inputs`, .* complex"),
        ({"inputs": [[np.nan]], "labels": [1]}, r"finite numbers .* has nan at index \(0, 0\)"),
        ({"inputs": [[1.0]], "labels": [np.inf]}, r"finite numbers .* `labels` .* has inf"),
        (
            {
                "inputs": [[1.0]],
                "labels": [1],
                "test_inputs": [[1.0, 2.0]],
                "test_labels": [1],
            },
            "have `test_inputs` of the shape of `inputs`",
        ),
        (
            {"inputs": [[1.0]], "labels": [1], "test_inputs": [[1.0]], "test_labels": ["a"]},
            "have `test_labels` of the kind of `labels`",
        ),
    ],
)
def test_wrong_arrays_are_one_sentence(here, arrays, sentence, refused):
    np.savez("a.npz", **arrays)
    refused(lambda: esl.datasets.read("a.npz"), sentence)


def test_no_pickle_is_loaded(here, refused):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, ("sprung",))

    np.savez("a.npz", inputs=np.array([Trap()], dtype=object), labels=[1])
    refused(lambda: esl.datasets.read("a.npz"), "plain arrays, because a pickle runs")
    assert not (here / "sprung").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"data": "mars"}, r"`data` must be one of 'digits', .* or a file \.npz, \.csv or \.tsv"),
        ({"data": "mine.parquet"}, "`data` must be one of"),
        ({"data": "none.npz"}, "`data` must be a file that is there, .* nothing at none.npz"),
        ({"data": "mine.csv"}, "`label` must name the column of the labels of mine.csv"),
        ({"data": "mine.csv", "label": "kin"}, "`label` must be a column of mine.csv"),
        ({"data": "digits", "label": "kind"}, "`label` must be given with a table"),
        ({"data": "digits", "loss": "hinge"}, "`loss` must be one of 'auto', 'cross_entropy'"),
        ({"data": "diabetes", "loss": "cross_entropy"}, "`loss` must be 'squared_error' for"),
        ({"data": "numbers.npz", "loss": "cross_entropy"}, "one class for each example"),
        (
            {"data": "mine.csv", "label": "kind", "loss": "squared_error"},
            "numbers as labels for a squared error, .* text, such as 'red, dry'",
        ),
        (
            {"data": "classes.npz", "model": "net.py:missing"},
            "'undefined' .*net.py, line [0-9]+: re",
        ),
        (
            {"data": "classes.npz", "model": "net.py:Wrong"},
            "net.py, line [0-9]+: return self.layer",
        ),
        ({"data": "classes.npz", "model": "net.py:nothing"}, "`model` .* returns an int"),
        ({"data": "classes.npz", "model": "net.py:number"}, "`model` .* is an int"),
        ({"data": "classes.npz", "model": "net.py:nowhere"}, "`model` .* no 'nowhere'"),
        ({"data": "classes.npz", "model": "other.py:Net"}, "`model` .*other.py"),
        (
            {"data": "classes.npz", "model": "net.py:deeper"},
            "also takes depth, which has no default",
        ),
        ({"data": "classes.npz", "model": "net.py:tokens"}, "token ids, which are integers"),
        ({"data": "classes.npz", "model": "resnet"}, "`model` must be one of 'mlp', or the place"),
        (
            {"data": "classes.npz", "model": "net.py:Net", "hidden": (5,)},
            "`hidden` must be left out",
        ),
        ({"data": "numbers.npz", "loss": "net.py:whole"}, "`loss` must return one number per"),
    ],
)
def test_wrong_settings_are_one_sentence(here, settings, sentence, refused):
    base = {"hidden": esl.RunConfig.hidden} if "net.py" in settings.get("model", "") else {}
    refused(lambda: problem(**{**base, **settings}), sentence)


def test_integers_that_are_nearly_all_different_need_a_loss(here, refused):
    rows = "".join(f"{i},{i * i}\n" for i in range(30))
    write(here, f"a,y\n{rows}")
    refused(lambda: problem(data="t.csv", label="y"), "`loss` must be given for integer labels")
    assert problem(data="t.csv", label="y", loss="squared_error").metrics == {}
    assert "test_accuracy" in problem(data="t.csv", label="y", loss="cross_entropy").metrics


# --- Models and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "numbers"),
    [("Net", 8), ("Dense", 8), ("by_place", 8), ("instance", 8), ("hidden", 12 + 8)],
)
def test_a_factory_of_each_kind(here, model, numbers):
    hidden = {"hidden": (3,)} if model == "hidden" else {"hidden": esl.RunConfig.hidden}
    made = problem(data="classes.npz", model=f"net.py:{model}", **hidden)
    assert made.potential.init(members=2, key=jax.random.key(0)).shape == (2, numbers)
    outcome = made.run(0.1, jax.random.key(1))
    assert bool(outcome.report.holds)
    assert 0 <= float(outcome.test_accuracy) <= 1


def test_a_squared_error_of_two_outputs(here):
    made = problem(data="numbers.npz", model="net.py:Net", hidden=esl.RunConfig.hidden, l2=0.0)
    assert made.metrics == {}
    position = made.potential.init(members=2, key=jax.random.key(0))[0]
    inputs, labels = (np.asarray(x) for x in esl.datasets.read("numbers.npz").train)
    layer = made.potential.unravel(position).layer
    misfit = inputs @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]) - labels
    np.testing.assert_allclose(
        made.potential.energy(position), (misfit**2).sum(axis=1).mean(), rtol=1e-5
    )


def test_a_loss_of_ones_own_has_the_labels_as_they_are(here):
    write(here, "a,y\n1,100.5\n2,200.0\n4,300.0\n3,50.0\n")
    made = problem(data="t.csv", label="y", loss="net.py:absolute")
    labels = np.concatenate([made.potential.labels, made.test.labels])
    assert sorted(labels.tolist()) == [50, 100.5, 200, 300]


def test_tokens_are_one_hot_for_the_network_without_an_embedding():
    made = problem(data="modular_addition")
    data = esl.datasets.modular_addition()
    p = data.classes
    pairs = np.asarray(data.train.inputs)
    expected = np.zeros((len(pairs), 2 * p))
    for i, (a, b) in enumerate(pairs):
        expected[i, a] = expected[i, p + b] = 1
    np.testing.assert_array_equal(made.potential.inputs, expected)


def test_tokens_stay_tokens_for_a_model_of_ones_own(here):
    made = problem(
        data="modular_addition", model="net.py:tokens", hidden=esl.RunConfig.hidden, steps=2
    )
    assert made.potential.inputs.dtype == jnp.int32
    assert bool(jnp.isfinite(made.run(0.1, jax.random.key(0)).final_loss))


def test_images_are_rows_of_numbers_for_the_network(here):
    pixels = np.random.default_rng(0).integers(0, 256, size=(9, 2, 3)).astype(np.uint8)
    np.savez(
        "a.npz",
        inputs=pixels,
        labels=np.arange(9) % 3,
        test_inputs=pixels,
        test_labels=np.arange(9) % 3,
    )
    made = problem(data="a.npz")
    np.testing.assert_allclose(made.potential.inputs, pixels.reshape(9, 6) / 255, rtol=1e-6)


# --- Runs and studies -----------------------------------------------------------------------------


def test_a_regression_runs_in_every_door_and_has_no_accuracy(tmp_path):
    config = esl.RunConfig(data="diabetes", rate=0.02, **SMALL)
    outcome = esl.run(config)
    assert outcome.metrics == {}
    study = esl.study.Study(config, grid={"data": ["diabetes", "wine"]})
    results = esl.study.run_study(study, tmp_path / "s.zarr")
    assert results.done.values.tolist() == [1, 1]
    assert np.isnan(results.test_accuracy.values).tolist() == [True, False]
    assert float(results.final_loss[0]) == float(outcome.final_loss)
    assert results.final_loss.attrs["units"] == "units of the loss"
    assert esl.study.open_study(tmp_path / "s.zarr").equals(results)


def test_a_run_sees_that_its_file_has_changed(here):
    config = esl.RunConfig(data="classes.npz", **SMALL)
    before = esl.run(config)
    with np.load("classes.npz") as arrays:
        np.savez("classes.npz", inputs=arrays["inputs"] + 1.0, labels=arrays["labels"])
    assert float(esl.run(config).final_loss) != float(before.final_loss)


@pytest.mark.parametrize("changed", ["classes.npz", "net.py"])
def test_a_study_is_not_resumed_on_other_files(here, changed, refused):
    base = esl.RunConfig(
        data="classes.npz", model="net.py:Net", **{**SMALL, "hidden": esl.RunConfig.hidden}
    )
    study = esl.study.Study(base, grid={"seed": range(2)})
    esl.study.run_study(study, "s.zarr")
    # Reading needs none of the files.
    with (here / changed).open("rb") as file:
        content = file.read()
    (here / changed).unlink()
    assert int((esl.study.open_study("s.zarr").done == 1).sum()) == 2
    (here / changed).write_bytes(content)
    esl.study.run_study(study, "s.zarr")
    if changed == "net.py":
        (here / changed).write_text(MODELS + "\n# Later.\n")
    else:
        np.savez(changed, inputs=np.ones((20, 3)), labels=np.arange(20) % 2)
    refused(lambda: esl.study.run_study(study, "s.zarr"), f"`out` must .*{changed} has changed")
    larger = dataclasses.replace(study, grid={"seed": range(3)})
    refused(
        lambda: esl.study.run_study(larger, "t.zarr", reuse=["s.zarr"]),
        f"`reuse` must .*{changed} has changed",
    )
