"""Runs made elsewhere: their files, and their snapshots as a `Trajectory` without rates."""

import io
import pickle
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import esljax as esl
from esljax.measures.velocities import learning_clock

# A rigid translation by `moved` along (1, 2, -2), which has length 3.
TIMES = np.array([100.0, 110.0, 120.0, 150.0, 200.0])
MOVED = np.array([0.0, 1.0, 2.0, 3.0, 5.0])
SCALED = (TIMES - 100) / 100


def translation(members=6, dtype=np.float64):
    cloud = np.random.default_rng(0).normal(size=(members, 3))
    return (cloud + MOVED[:, None, None] * np.array([1.0, 2.0, -2.0])).astype(dtype)


def wandering(seed=0, links=4, members=5, d=3):
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.normal(size=(links + 1, members, d)), axis=0)


# A Trajectory without learning rates


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "transport", [esl.ExactTransport(), esl.GaussianTransport()], ids=["exact", "gaussian"]
)
def test_a_translation_by_hand(transport):
    """Every W2 is the distance moved, so that Σ = 9 Σ_j Δc_j²/Δs_j, whatever the cloud."""
    path = esl.from_snapshots(translation(), TIMES)
    report = esl.speed_limit(path, transport=transport)
    np.testing.assert_allclose(path.times, SCALED, rtol=1e-15)
    np.testing.assert_allclose(
        report.entropy_production, 9 * np.sum(np.diff(MOVED) ** 2 / np.diff(SCALED)), rtol=1e-12
    )
    np.testing.assert_allclose(
        report.entropy_production_coarse, 9 * (4 / 0.2 + 9 / 0.8), rtol=1e-12
    )
    np.testing.assert_allclose([report.length_squared, report.w2_squared], 9 * 25, rtol=1e-12)
    np.testing.assert_allclose(report.speed, 3 * np.diff(MOVED) / np.diff(SCALED), rtol=1e-12)
    np.testing.assert_allclose(report.times, (SCALED[1:] + SCALED[:-1]) / 2, rtol=1e-14)
    np.testing.assert_allclose(report.standard_error.gap, 0, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_velocities_on_uneven_times_by_hand():
    """All members share one velocity at each snapshot: Σ is the trapezoidal sum of its square."""
    before, after = [0, 0, 1, 2, 3], [1, 2, 3, 4, 4]
    velocities = 3 * (MOVED[after] - MOVED[before]) / (SCALED[after] - SCALED[before])
    expected = np.sum(np.diff(SCALED) * (velocities[1:] ** 2 + velocities[:-1] ** 2) / 2)
    path = esl.from_snapshots(translation(), TIMES)
    projected = esl.ProjectedTransport(
        esl.ExactTransport(), np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    )
    for transport, velocity in [
        (esl.ExactTransport(), esl.TransportVelocity(esl.ExactTransport())),
        (esl.GaussianTransport(), esl.TransportVelocity(esl.GaussianTransport())),
        (projected, esl.TransportVelocity(esl.ExactTransport())),
    ]:
        report = esl.speed_limit(path, transport=transport, velocity=velocity, jackknife=0)
        np.testing.assert_allclose(report.entropy_production, expected, rtol=1e-12)
        np.testing.assert_allclose(
            report.entropy_production_chain,
            9 * np.sum(np.diff(MOVED) ** 2 / np.diff(SCALED)),
            rtol=1e-12,
        )
        length = np.sum(np.diff(SCALED) * (velocities[1:] + velocities[:-1]) / 2)
        np.testing.assert_allclose(report.length_squared, length**2, rtol=1e-12)
        assert report.dissipation is None
        assert report.learning_time is None
    # Members' own paths belong to links.
    report = esl.speed_limit(
        path, transport=esl.ExactTransport(), velocity=esl.PathVelocity(), jackknife=0
    )
    np.testing.assert_allclose(
        report.entropy_production, 9 * np.sum(np.diff(MOVED) ** 2 / np.diff(SCALED)), rtol=1e-12
    )
    np.testing.assert_allclose(report.length_squared, 9 * 25, rtol=1e-12)


def test_unknown_numbers_are_none_and_not_printed():
    path = esl.from_snapshots(translation(dtype=np.float32), TIMES)
    assert (path.rates, path.temperatures, path.energies) == (None, None, None)
    assert str(path) == "Trajectory: 6 members of 3 coordinates, recorded, 5 snapshots"
    report = esl.speed_limit(path, transport=esl.ExactTransport())
    assert (
        report.dissipation,
        report.learning_time,
        report.noise_floor,
        report.standard_error.dissipation,
    ) == (None,) * 4
    assert str(report).splitlines()[1].split()[:4] == ["entropy", "production", "Σ", "282"]
    assert "dissipation" not in str(report)
    assert "learning time" not in str(report)
    assert "The speed limit holds: Σ is 1.25 times W2²" in report.verdict()
    assert "noise of the steps, which was not recorded" in report.verdict()
    assert report.holds
    np.testing.assert_array_equal(learning_clock(path), path.times)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "velocity", [None, esl.TransportVelocity(esl.ExactTransport())], ids=["chain", "velocity"]
)
def test_a_simulated_run_and_its_recording_agree(velocity):
    """At rate 1/K learning time is training time: only D, U and the noise floor are lost."""
    start = np.random.default_rng(2).normal(size=(8, 2))
    path = esl.simulate(
        esl.Quadratic([1.0, 3.0]),
        esl.Langevin(0.05, 0.1),
        start,
        steps=20,
        snapshots=10,
        key=jax.random.key(0),
    )
    known = esl.speed_limit(path, transport=esl.ExactTransport(), velocity=velocity, jackknife=0)
    blind = esl.speed_limit(
        esl.from_snapshots(path.positions),
        transport=esl.ExactTransport(),
        velocity=velocity,
        jackknife=0,
    )
    for name in ("length_squared", "w2_squared", "speed", "times", "geometric"):
        np.testing.assert_allclose(getattr(blind, name), getattr(known, name), rtol=1e-12)
    # Two equal steps in a link weigh the rates at its ends as one does.
    np.testing.assert_allclose(blind.entropy_production, known.entropy_production, rtol=1e-12)
    assert known.dissipation is not None


def test_several_recorded_runs():
    runs = [esl.from_snapshots(wandering(seed), TIMES) for seed in range(3)]
    report = esl.speed_limit(runs, transport=esl.GaussianTransport())
    singles = [
        float(
            esl.speed_limit(run, transport=esl.GaussianTransport(), jackknife=0).entropy_production
        )
        for run in runs
    ]
    np.testing.assert_allclose(report.entropy_production, np.mean(singles), rtol=1e-5)
    np.testing.assert_allclose(
        report.standard_error.entropy_production, np.std(singles, ddof=1) / np.sqrt(3), rtol=1e-4
    )


def test_derivatives_in_positions_and_times():
    """Σ is of second degree in the positions, and homogeneous of degree 0 in the times."""
    positions = jnp.asarray(translation(dtype=np.float32))

    def sigma(scale, stretch):
        path = esl.from_snapshots(scale * positions, stretch * jnp.asarray(SCALED, jnp.float32))
        return esl.speed_limit(path, transport=esl.ExactTransport(), jackknife=0).entropy_production

    value, (in_scale, in_stretch) = jax.value_and_grad(sigma, (0, 1))(1.0, 1.0)
    np.testing.assert_allclose(in_scale, 2 * value, rtol=1e-5)
    assert abs(in_stretch) < 1e-3 * value
    np.testing.assert_allclose(jax.jit(sigma)(1.0, 7.0), value, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype", [np.int32, np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.longdouble]
)
def test_numbers_of_any_kind(dtype):
    whole = np.round(wandering() * 8).astype(dtype)
    path = esl.from_snapshots(whole)
    assert path.positions.dtype == np.float32
    np.testing.assert_array_equal(path.positions, whole.astype(np.float32))
    assert esl.from_snapshots(jnp.asarray(whole.astype(np.float32)), observed=True).observed


def test_step_counts_beyond_single_precision():
    path = esl.from_snapshots(wandering(), 10**9 + np.array([0, 1, 2, 3, 10]))
    np.testing.assert_allclose(path.times, [0, 0.1, 0.2, 0.3, 1], rtol=1e-6)


def _with(value, *where):
    positions = wandering()
    positions[where] = value
    return positions


@pytest.mark.parametrize(
    ("positions", "times", "sentence"),
    [
        (
            np.zeros((4, 3)),
            None,
            r"must have shape \(snapshots, members, numbers per member\), but has shape \(4, 3\)\.",
        ),
        (np.zeros((1, 4, 3)), None, "but holds 1 snapshot of 4 members"),
        (np.zeros((4, 1, 3)), None, "but holds 4 snapshots of 1 member"),
        (np.zeros((4, 5, 0)), None, r"but has shape \(4, 5, 0\)"),
        (
            _with(np.nan, 2, 3, 1),
            None,
            r"must be finite in float32, but is not for member 3 at snapshot 2\.",
        ),
        (
            _with(np.inf, slice(3, None), 1),
            None,
            "member 1 at snapshot 3, the first of 2 such places",
        ),
        (
            _with(1e300, 1, 0),
            None,
            "must be finite in float32, but is not for member 0 at snapshot 1",
        ),
        (wandering().astype(object), None, "must be an array, but has dtype object"),
        (wandering() > 0, None, "must hold real numbers, but has dtype bool"),
        (wandering() * 1j, None, "must hold real numbers, but has dtype complex128"),
        ([[1.0, 2.0], [3.0]], None, "must be an array, but is a list: setting an array"),
        (
            wandering(),
            [0, 1, 2],
            r"`times` must have shape \(5,\), one for each snapshot, but has shape \(3,\)",
        ),
        (
            wandering(),
            [0, 1, 3, 2, 4],
            "must increase from snapshot to snapshot, but is 3 and then 2 at snapshots 2 and 3",
        ),
        (wandering(), [0, 1, 1, 2, 4], "is 1 and then 1 at snapshots 1 and 2"),
        (wandering(), [0, 1, np.nan, 2, 4], "`times` must be finite"),
        (wandering(), list("abcde"), "`times` must be an array, but has dtype <U1"),
        (wandering(), [0, 1, 1 + 1e-9, 3, 4], "`times` must stay apart in float32"),
        (wandering(), [-1.5e308, 0, 1, 2, 1.5e308], "`times` must stay apart in float32"),
    ],
)
def test_bad_arrays_are_one_sentence(positions, times, sentence, refused):
    refused(lambda: esl.from_snapshots(positions, times), sentence)


def test_drift_of_a_recorded_run_is_not_known(refused):
    path = esl.from_snapshots(wandering())

    def call():
        return esl.speed_limit(
            path,
            transport=esl.GaussianTransport(),
            velocity=esl.AffineVelocity(),
            potential=esl.Quadratic(1.0),
        )

    refused(
        call,
        r"be TransportVelocity\(...\) for a recorded run, .*, but is AffineVelocity",
    )
    simulated = esl.simulate(
        esl.Quadratic(1.0),
        esl.Langevin(0.1),
        wandering()[0],
        steps=4,
        snapshots=4,
        key=jax.random.key(0),
    )
    refused(
        lambda: esl.speed_limit([path, simulated], transport=esl.ExactTransport()),
        "must hold runs of one shape",
    )


# Projections


@pytest.mark.usefixtures("x64")
def test_principal_directions_are_those_of_the_covariance(refused):
    positions = wandering(3, links=7, members=9, d=6) * np.array([1, 5, 2, 0.1, 3, 0.5])
    matrix = np.asarray(esl.principal_directions(positions, 3))
    values, vectors = np.linalg.eigh(np.cov(positions.reshape(-1, 6).T))
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        np.abs(np.sum(matrix * vectors[:, ::-1][:, :3], axis=0)), 1, rtol=1e-9
    )
    assert np.all(matrix[np.argmax(np.abs(matrix), axis=0), range(3)] > 0)
    assert values[0] < values[-1]
    refused(
        lambda: esl.principal_directions(positions, 7),
        "`coordinates` must be at most 6, the numbers in one member, but is 7",
    )
    refused(
        lambda: esl.principal_directions(np.zeros((2, 2, 9)), 5),
        "must be at most 4, the members of all snapshots together, but is 5",
    )


def test_random_directions(refused):
    matrix = np.asarray(esl.random_directions(7, 3, jax.random.key(0)))
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(3), atol=1e-6)
    assert not np.allclose(matrix, esl.random_directions(7, 3, jax.random.key(1)))
    # Uniform directions: the mean of u uᵀ is 1/d, and the mean of u shows a fixed sign of entries.
    many = np.asarray(
        jax.vmap(lambda key: esl.random_directions(4, 2, key))(
            jax.random.split(jax.random.key(2), 4000)
        )
    )
    assert np.all(np.abs(many.mean(axis=0)) < 5 * 0.5 / np.sqrt(4000))
    np.testing.assert_allclose(
        np.einsum("kip,kjp->pij", many, many) / 4000,
        np.broadcast_to(np.eye(4) / 4, (2, 4, 4)),
        atol=5 * 0.25 / 60,
    )
    refused(lambda: esl.random_directions(3, 4, jax.random.key(0)), "must be at most 3")
    refused(lambda: esl.random_directions(3, 2, 0), "`key` must be made by")


# Files of snapshots


def save_zarr(path, **arrays):
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    for name, array in arrays.items():
        group.create_array(name, data=np.asarray(array))


@pytest.mark.parametrize("form", ["npz", "zarr"])
def test_arrays_come_back_as_stored(form, tmp_path):
    save = np.savez if form == "npz" else save_zarr
    for k, (name, times) in enumerate([("positions", TIMES), ("features", None)]):
        path = tmp_path / f"{k}.{form}"
        save(path, **{name: wandering()}, **({} if times is None else {"times": times}))
        recording = esl.recordings.read(path)
        np.testing.assert_array_equal(recording.positions, wandering())
        assert recording.observed == (name == "features")
        assert recording.times is None if times is None else np.array_equal(recording.times, TIMES)


def test_zarr_is_an_extra(tmp_path, monkeypatch, refused):
    save_zarr(tmp_path / "run.zarr", positions=wandering())
    monkeypatch.setitem(sys.modules, "zarr", None)
    refused(
        lambda: esl.recordings.read(tmp_path / "run.zarr"),
        r"unless zarr is installed \(pip install 'zarr>=3'\), but is ",
    )


# Folders of checkpoints


def parameters(member, time, dtype=np.float32):
    rng = np.random.default_rng([member, time])

    def sixteenths(*shape):
        return np.asarray(rng.integers(-16, 16, size=shape) / 16, dtype)

    return {
        "layer": {"kernel": sixteenths(4, 3), "bias": sixteenths(3)},
        "head": sixteenths(3, 2),
        "scale": sixteenths(),
    }


def flat(tree):
    return {
        "layer/kernel": tree["layer"]["kernel"],
        "layer/bias": tree["layer"]["bias"],
        "head": tree["head"],
        "scale": tree["scale"],
    }


def row(tree):
    """By hand: the sorted keys are head, layer/bias, layer/kernel, scale."""
    layer = tree["layer"]
    return np.concatenate(
        [
            np.asarray(x, np.float64).ravel()
            for x in (tree["head"], layer["bias"], layer["kernel"], tree["scale"])
        ]
    )


def save_checkpoint(form, path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "npz":
        np.savez(path.with_name(path.name + ".npz"), **flat(tree))
    elif form == "safetensors":
        # Not `flat` in one go: safetensors wants contiguous arrays of its own.
        safetensors.numpy.save_file(flat(tree), path.with_name(path.name + ".safetensors"))
    elif form == "orbax":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.resolve(), jax.tree.map(jnp.asarray, tree))
    else:
        with ocp.CheckpointManager(path.parent.resolve()) as manager:
            manager.save(
                int(path.name), args=ocp.args.StandardSave(jax.tree.map(jnp.asarray, tree))
            )
            manager.wait_until_finished()


def save_folder(folder, form, dtype=np.float32, members=(0, 1, 10), times=(0, 20, 100)):
    for member in members:
        for time in times:
            name = str(time) if form == "manager" else f"lr0.1_step_{time}"
            save_checkpoint(
                form, folder / f"run7_member_{member}" / name, parameters(member, time, dtype)
            )
    return np.array(
        [[row(parameters(member, time, dtype)) for member in members] for time in times]
    )


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.float64, np.float16, ml_dtypes.bfloat16],
    ids=lambda dtype: np.dtype(dtype).name,
)
@pytest.mark.parametrize("form", ["npz", "safetensors", "orbax", "manager"])
def test_checkpoints(form, dtype, tmp_path, request):
    if dtype == np.float64 and form in ("orbax", "manager"):
        request.getfixturevalue("x64")
    expected = save_folder(tmp_path / "run", form, dtype, members=(0, 10), times=(5, 20))
    (tmp_path / "run" / "logs").mkdir()
    (tmp_path / "run" / "run7_member_0" / "5.orbax-checkpoint-tmp-1700").mkdir()
    (tmp_path / "run" / "notes_2.txt").write_text("not a checkpoint")
    (tmp_path / "run" / "run7_member_0" / "metrics_5.json").write_text("{}")
    recording = esl.recordings.read(tmp_path / "run")
    np.testing.assert_array_equal(recording.positions, expected)
    np.testing.assert_array_equal(recording.times, [5, 20])
    assert recording.positions.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert not recording.observed


def test_numbers_order_members_and_times(tmp_path):
    """By size rather than by name: 100 comes after 20, and member 10 after member 1."""
    expected = save_folder(tmp_path, "npz")
    recording = esl.recordings.read(tmp_path)
    np.testing.assert_array_equal(recording.positions, expected)
    np.testing.assert_array_equal(recording.times, [0, 20, 100])
    for file in tmp_path.rglob("*_100.npz"):
        file.rename(file.with_name("lr0.1_step_2.5.npz"))
    np.testing.assert_array_equal(esl.recordings.read(tmp_path).times, [0, 2.5, 20])


@pytest.mark.usefixtures("x64")
def test_all_forms_give_the_same_numbers(tmp_path):
    positions = save_folder(tmp_path / "npz", "npz")
    for form in ("safetensors", "orbax"):
        save_folder(tmp_path / form, form)
    np.savez(tmp_path / "run.npz", positions=positions.astype(np.float32), times=[0, 20, 100])
    save_zarr(tmp_path / "run.zarr", positions=positions.astype(np.float32), times=[0, 20, 100])
    numbers = []
    for name in ("npz", "safetensors", "orbax", "run.npz", "run.zarr"):
        recording = esl.recordings.read(tmp_path / name)
        report = esl.speed_limit(
            esl.from_snapshots(recording.positions, recording.times), transport=esl.ExactTransport()
        )
        numbers.append(
            [
                float(x)
                for x in (
                    report.entropy_production,
                    report.length_squared,
                    report.w2_squared,
                    report.standard_error.gap,
                )
            ]
        )
    assert numbers == [numbers[0]] * 5
    assert numbers[0][0] > 0


# Broken files


def break_folder(kind, folder):
    """One fault in a good folder of checkpoints."""
    member = folder / "run7_member_1"
    file = member / "lr0.1_step_20.npz"
    if kind == "missing time":
        file.unlink()
    elif kind == "extra time":
        shutil.copy(file, member / "lr0.1_step_30.npz")
    elif kind == "empty member":
        shutil.rmtree(member)
        member.mkdir()
    elif kind == "same time twice":
        shutil.copy(file, member / "lr0.1_step_020.npz")
    elif kind == "same member twice":
        shutil.copytree(member, folder / "run7_member_01")
    elif kind == "shape":
        np.savez(file, **{**flat(parameters(1, 20)), "head": np.zeros((3, 5), np.float32)})
    elif kind == "transposed":
        np.savez(file, **{**flat(parameters(1, 20)), "head": np.zeros((2, 3), np.float32)})
    elif kind == "lacks":
        np.savez(
            file, **{key: value for key, value in flat(parameters(1, 20)).items() if key != "head"}
        )
    elif kind == "extra":
        np.savez(file, **flat(parameters(1, 20)), extra=np.zeros(2, np.float32))
    elif kind == "counter":
        np.savez(file, **flat(parameters(1, 20)), labels=np.array(3))
    elif kind == "objects":
        np.savez(file, **{**flat(parameters(1, 20)), "head": np.array([{}], object)})
    elif kind == "empty":
        np.savez(file)
    elif kind == "text":
        file.write_text("no archive")
    elif kind == "torch":
        (member / "step_20.pt").write_bytes(pickle.dumps({}))
    elif kind == "not orbax":
        file.unlink()
        (member / "step_20").mkdir()
    elif kind == "nothing":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "missing time",
            r"hold every member at every time, but \S+run7_member_1 has no checkpoint at 20\.",
        ),
        (
            "extra time",
            r"hold every member at every time, but \S+run7_member_0 has no checkpoint at 30\.",
        ),
        (
            "empty member",
            r"but \S+run7_member_1 has no \.npz, \.safetensors or Orbax folder with a number",
        ),
        (
            "same time twice",
            "each member and time once, but .* has both lr0.1_step_020.npz and lr0.1_step_20.npz",
        ),
        ("same member twice", "has both run7_member_01 and run7_member_1"),
        (
            "shape",
            r"parameters of one shape in every checkpoint, but `head` has \(3, 2\) in .*_0.npz "
            r"and \(3, 5\) in .*_20.npz",
        ),
        ("transposed", r"but `head` has \(3, 2\) in .* and \(2, 3\) in "),
        (
            "lacks",
            r"the same keys in every checkpoint, but \S+member_1/lr0.1_step_20.npz lacks `head`",
        ),
        ("extra", r"lr0.1_step_0.npz lacks `extra`, which \S+member_1/lr0.1_step_20.npz has"),
        ("counter", r"hold floating-point parameters alone .*, but `labels` of .* has dtype int64"),
        ("objects", "because a pickle runs whatever code it carries, but `head` of .* is pickled"),
        ("empty", "hold parameters, but .* holds none"),
        ("text", "be a whole .npz archive, but .* is cut short or something else"),
        (
            "torch",
            r"\(save .npz or .safetensors\), .* never loaded, but \S+step_20.pt may be a pickle",
        ),
        ("not orbax", "step_20"),
        (
            "nothing",
            r"as in member_000/step_000100.npz, but \S+ has no folder with a number in its name",
        ),
    ],
)
def test_broken_folders_are_one_sentence(kind, sentence, tmp_path, refused):
    save_folder(tmp_path / "run", "npz")
    esl.recordings.read(tmp_path / "run")
    break_folder(kind, tmp_path / "run")
    refused(lambda: esl.recordings.read(tmp_path / "run"), sentence)


class Bomb:
    """An untrusted pickle."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_pickles_are_never_loaded(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for name in ("run.pt", "run.pkl", "run.npz", "run.PTH"):
        Path(name).write_bytes(pickle.dumps(Bomb()))
        refused(lambda name=name: esl.recordings.read(name), "pickle|cut short or something else")
    np.savez("objects.npz", positions=np.array([Bomb()], object))
    refused(lambda: esl.recordings.read("objects.npz"), "a pickle runs whatever code it carries")
    np.savez("matrix.npz", matrix=np.array([[Bomb()]], object))
    refused(
        lambda: esl.recordings.read_matrix("matrix.npz"), "a pickle runs whatever code it carries"
    )
    assert not Path("exploded").exists()
    pickle.loads(Path("run.pt").read_bytes())
    assert Path("exploded").exists(), "it would have been seen"


def test_other_files_are_one_sentence(tmp_path, refused):
    refused(
        lambda: esl.recordings.read(tmp_path / "none.npz"),
        "`recording` must be a file or folder, but .*none.npz does not exist",
    )
    refused(lambda: esl.recordings.read(tmp_path / "none.zarr"), "does not exist")
    (tmp_path / "run.csv").write_text("1,2")
    refused(
        lambda: esl.recordings.read(tmp_path / "run.csv"),
        "be .npz, .zarr or a folder of checkpoints, but is ",
    )
    for k, arrays in enumerate([{}, {"weights": wandering()}]):
        np.savez(tmp_path / f"{k}.npz", **arrays)
        refused(
            lambda k=k: esl.recordings.read(tmp_path / f"{k}.npz"),
            "hold either `positions` or `features`, but .* holds neither",
        )
    np.savez(tmp_path / "both.npz", positions=wandering(), features=wandering())
    refused(lambda: esl.recordings.read(tmp_path / "both.npz"), "holds both")
    (tmp_path / "folder.npz").mkdir()
    refused(
        lambda: esl.recordings.read(tmp_path / "folder.npz"),
        "has no folder with a number in its name",
    )


@pytest.mark.parametrize(
    ("matrix", "sentence"),
    [
        (np.zeros(3), r"hold an array `matrix` \(d, p\) of numbers, but .* is \(3,\) of float64"),
        (np.zeros((3, 0)), r"is \(3, 0\) of float64"),
        (np.array([["a"]]), "of <U1"),
        (np.full((3, 2), np.nan), "hold a finite `matrix`"),
    ],
)
def test_bad_matrices_are_one_sentence(matrix, sentence, tmp_path, refused):
    np.savez(tmp_path / "matrix.npz", matrix=matrix)
    refused(lambda: esl.recordings.read_matrix(tmp_path / "matrix.npz"), sentence)
    np.savez(tmp_path / "other.npz", other=matrix)
    refused(lambda: esl.recordings.read_matrix(tmp_path / "other.npz"), "holds none")
    refused(
        lambda: esl.recordings.read_matrix(tmp_path / "missing.npz"),
        "be 'pca', 'random', 'none' or an .npz file",
    )


def _bytes_of(save):
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


NPZ = _bytes_of(lambda file: np.savez(file, positions=wandering(), times=TIMES))
PACKED = _bytes_of(lambda file: np.savez_compressed(file, positions=wandering(), times=TIMES))
SAFE = safetensors.numpy.save(flat(parameters(0, 0)))


def read_quietly(path):
    """None for a recording, or the message of an `InputError`; any other error fails the test."""
    try:
        recording = esl.recordings.read(path)
        esl.from_snapshots(recording.positions, recording.times, observed=recording.observed)
    except esl.InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("whole", [NPZ, PACKED], ids=["npz", "compressed"])
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_npz(whole, data, tmp_path):
    cut = whole[: data.draw(st.integers(0, len(whole) - 1), label="cut")]
    (tmp_path / "cut.npz").write_bytes(cut)
    assert read_quietly(tmp_path / "cut.npz") is not None
    place = data.draw(st.integers(0, len(whole) - 1), label="place")
    flipped = bytes([whole[place] ^ data.draw(st.integers(1, 255), label="flip")])
    (tmp_path / "flipped.npz").write_bytes(whole[:place] + flipped + whole[place + 1 :])
    read_quietly(tmp_path / "flipped.npz")


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_damaged_safetensors(data, tmp_path):
    for member in (0, 1):
        for time in (0, 1):
            folder = tmp_path / f"member_{member}"
            folder.mkdir(exist_ok=True)
            (folder / f"{time}.safetensors").write_bytes(SAFE)
    assert read_quietly(tmp_path) is None
    file = tmp_path / "member_1" / "1.safetensors"
    file.write_bytes(SAFE[: data.draw(st.integers(0, len(SAFE) - 1), label="cut")])
    assert read_quietly(tmp_path) is not None
    place = data.draw(st.integers(0, len(SAFE) - 1), label="place")
    file.write_bytes(
        SAFE[:place]
        + bytes([SAFE[place] ^ data.draw(st.integers(1, 255), label="flip")])
        + SAFE[place + 1 :]
    )
    read_quietly(tmp_path)


def test_damaged_zarr(tmp_path):
    save_zarr(tmp_path / "run.zarr", positions=wandering(), times=TIMES)
    rng = np.random.default_rng(0)
    for k, file in enumerate(
        sorted(path for path in (tmp_path / "run.zarr").rglob("*") if path.is_file())
    ):
        whole = file.read_bytes()
        for cut in {0, 1, len(whole) - 1, *rng.integers(0, len(whole), 3).tolist()}:
            file.write_bytes(whole[:cut])
            assert read_quietly(tmp_path / "run.zarr") is not None, (k, file, cut)
        file.write_bytes(whole)
    assert read_quietly(tmp_path / "run.zarr") is None
    save_zarr(tmp_path / "nested.zarr")
    zarr.open_group(str(tmp_path / "nested.zarr"), mode="a").create_group("positions")
    assert "is a group" in read_quietly(tmp_path / "nested.zarr")
    zarr.save_group(str(tmp_path / "old.zarr"), positions=wandering(), zarr_format=2)
    assert read_quietly(tmp_path / "old.zarr") is not None


def test_damaged_orbax(tmp_path):
    save_folder(tmp_path / "whole", "orbax", members=(0, 1), times=(0, 1))
    rng = np.random.default_rng(1)
    damaged = tmp_path / "whole" / "run7_member_1" / "lr0.1_step_1"
    seen = 0
    for file in sorted(path for path in damaged.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for cut in {0, *rng.integers(0, max(len(whole), 1), 2).tolist()}:
            file.write_bytes(whole[:cut])
            seen += read_quietly(tmp_path / "whole") is not None
        file.write_bytes(whole)
    assert seen > 3, "some files of a checkpoint do not matter, most do"
    assert read_quietly(tmp_path / "whole") is None
