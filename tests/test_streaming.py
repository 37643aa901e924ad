"""Runs larger than memory: members folded into few coordinates, against all of them in NumPy."""

import dataclasses
import errno
import itertools
import json
import os
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import esljax as esl
from esljax.command import cli
from esljax.command.measure import Measurement
from esljax.command.settings import MeasureConfig
from esljax.simulation.folding import All, Near
from esljax.transport import normal_rows

SHAPES = {"head/bias": (7,), "head/kernel": (12, 30), "layer/kernel": (40, 25)}
SIZES = {key: int(np.prod(shape)) for key, shape in SHAPES.items()}
# Blocks of 100 numbers of each of 8 members at 5 snapshots.
MEMORY = 4 * 5 * 8 * 4 * 100.0


def walk(kind, links=6, members=5, d=300, seed=0):
    """Members in motion, shape (J+1, n, d)."""
    rng = np.random.default_rng(seed)
    start, steps = rng.normal(size=(members, d)), rng.normal(size=(links, members, d))
    if kind == "far from 0":
        start += 1e3
    elif kind == "parallel":
        steps = np.broadcast_to(steps[:1], steps.shape) + 1e-7 * steps
    elif kind == "on a plane":
        steps = rng.normal(size=(links, members, 2)) @ rng.normal(size=(2, d))
    elif kind == "common":
        steps = np.broadcast_to(steps[:, :1], steps.shape).copy()
    steps *= {"slow": 1e-6, "restless": 1.0}.get(kind, 1e-2)
    if kind == "at rest":
        steps[2], steps[:, 1] = 0, 0
    return np.concatenate([start[None], start + np.cumsum(steps, axis=0)])


def squares(x, y):
    return np.sum((x[:, None] - y) ** 2, axis=-1)


def near(links):
    """The pairs of snapshots whose distances are kept."""
    everyone = itertools.combinations_with_replacement(range(links + 1), 2)
    return [(i, j) for i, j in everyone if j - i <= 2 or i == 0]


KINDS = ("noisy", "slow", "far from 0", "parallel", "on a plane", "common", "at rest")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", [Near, All])
def test_distances_are_kept(products, kind):
    """Of a step of 1e-6, the square is 1e-12 of that between members: still to nine digits."""
    members = walk(kind)
    few = products.of(members).placed()
    links = len(members) - 1
    assert few.shape == (7, 5, 4 * 5 if products is Near else 7 * 5)
    everyone = list(itertools.combinations(range(links + 1), 2))
    for i, j in near(links) if products is Near else everyone:
        expected, found = squares(members[i], members[j]), squares(few[i], few[j])
        # Places of size 1 and 1e3 are themselves rounded.
        rounding = 1e-15 * np.sqrt(expected) * np.abs(members).max() * np.sqrt(members.shape[2])
        np.testing.assert_array_less(np.abs(found - expected), 1e-9 * expected + rounding + 1e-25)


@pytest.mark.parametrize("products", [Near, All])
def test_members_at_rest_do_not_move_at_all(products):
    few = products.of(walk("at rest")).placed()
    np.testing.assert_array_equal(few[3], few[2])
    np.testing.assert_array_equal(few[:, 1], np.broadcast_to(few[0, 1], few[:, 1].shape))


def test_products_by_hand():
    """Of increments with the start, the way so far, the last increment and themselves; added up
    over two parts."""
    members = walk("noisy", d=5000)
    x = members[0] - members[0].mean(axis=0)
    steps = np.diff(members, axis=0)
    first, rest = (Near.of(members[:, :, part]) for part in (slice(0, 77), slice(77, None)))
    both = first.plus(rest)
    np.testing.assert_allclose(both.start, x @ x.T, atol=1e-9)
    before = np.zeros_like(x)
    for j, step in enumerate(steps):
        rows = np.concatenate([x, members[j] - members[0], before, step])
        np.testing.assert_allclose(both.links[j], step @ rows.T, atol=1e-10)
        before = step
    np.testing.assert_allclose(
        both.squares(), np.concatenate([np.sum(x**2, axis=1)[None], np.sum(steps**2, axis=2)])
    )
    kept = np.array([3, 0])
    np.testing.assert_array_equal(
        both.among(kept).links[2][:, 4:6], both.links[2][kept][:, 10 + kept]
    )


# Recordings on disk


def parameters(members):
    """Each member as a checkpoint, by snapshot and member."""
    cuts = np.cumsum(list(SIZES.values()))[:-1]
    for (j, i), _ in np.ndenumerate(members[..., 0]):
        parts = np.split(members[j, i], cuts)
        yield (
            (j, i),
            {key: part.reshape(SHAPES[key]) for key, part in zip(SHAPES, parts, strict=True)},
        )


def safetensors_of(path, arrays):
    path.mkdir(parents=True)
    safetensors.numpy.save_file(arrays, path / "model.safetensors")


def shards_of(path, arrays):
    path.mkdir(parents=True)
    first = {"head/bias": arrays["head/bias"], "layer/kernel": arrays["layer/kernel"]}
    second = {"head/kernel": arrays["head/kernel"]}
    owners = {}
    for k, shard in enumerate((first, second), 1):
        name = f"model-{k:05d}-of-00002.safetensors"
        safetensors.numpy.save_file(shard, path / name)
        owners |= dict.fromkeys(shard, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))


def npz_of(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path.with_suffix(".npz"), **arrays)


def packed_of(path, arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def turned_of(path, arrays):
    npz_of(path, {key: np.asfortranarray(array) for key, array in arrays.items()})


WRITERS = {
    "safetensors": safetensors_of,
    "shards": shards_of,
    "npz": npz_of,
    "npz, compressed": packed_of,
    "npz, by columns": turned_of,
}


def written(folder, members, write=safetensors_of):
    for (j, i), arrays in parameters(members):
        write(folder / f"seed{i}" / f"step{100 * j}", arrays)
    return folder


def small(kind="noisy", dtype=np.float32, **sizes):
    return walk(kind, **{"links": 4, "members": 8, "d": sum(SIZES.values()), **sizes}).astype(dtype)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return written(tmp_path_factory.mktemp("run"), small())


@pytest.fixture(scope="module")
def restless(tmp_path_factory):
    """As far apart at different times as at one."""
    return written(tmp_path_factory.mktemp("run"), small("restless"))


def in_memory(folder):
    held = esl.recordings.read(folder)
    return esl.from_snapshots(held.positions.astype(np.float64), held.times, keys=held.keys)


def check_equal(ours, theirs, tolerance=1e-9):
    """Every number and every standard error of two reports; errors in units of the largest one."""
    sigma = abs(float(theirs.entropy_production))
    for field in dataclasses.fields(theirs):
        value = getattr(theirs, field.name)
        if isinstance(value, jax.Array) and value.dtype != bool:
            np.testing.assert_allclose(
                getattr(ours, field.name),
                value,
                rtol=tolerance,
                atol=tolerance * sigma,
                err_msg=field.name,
            )
    for name, error in theirs.standard_error.numbers.items():
        if error is not None:
            np.testing.assert_allclose(
                ours.standard_error.get(name), error, rtol=tolerance, atol=tolerance * sigma
            )


TRANSPORTS = (esl.ExactTransport(), esl.GaussianTransport(), esl.SinkhornTransport(epsilon=20.0))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("transport", TRANSPORTS, ids=lambda t: t.name)
def test_the_report_is_that_of_the_members(recorded, transport):
    """Numbers, debiased numbers, errors, findings and shares of parameters."""
    theirs = esl.speed_limit(in_memory(recorded), transport=transport, debias=True)
    path = esl.from_checkpoints(recorded, memory=MEMORY)
    ours = esl.speed_limit(path, transport=transport, debias=True)
    assert path.positions.shape[2] < path.folded.coordinates == sum(SIZES.values())
    check_equal(ours, theirs)
    assert [finding.name for finding in ours.diagnose()] == [
        finding.name for finding in theirs.diagnose()
    ]
    for own, expected in zip(ours.by_key(), theirs.by_key(), strict=True):
        assert own[:2] == expected[:2]
        np.testing.assert_allclose(own[2:], expected[2:], rtol=1e-7)
    np.testing.assert_allclose(ours.evidence.distances, theirs.evidence.distances, rtol=1e-9)
    np.testing.assert_allclose(ours.evidence.pace, theirs.evidence.pace, rtol=1e-9)
    # Of a sample of the numbers.
    np.testing.assert_allclose(ours.evidence.quantum, theirs.evidence.quantum, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_any_layout(tmp_path, write):
    members = small(members=3, links=2)
    folder = written(tmp_path / "run", members, write)
    path = esl.from_checkpoints(folder, memory=4 * 3 * 3 * 4 * 100.0)
    for i, j in ((0, 1), (1, 2), (0, 2), (1, 1)):
        expected = squares(members[i].astype(np.float64), members[j].astype(np.float64))
        np.testing.assert_allclose(
            squares(np.asarray(path.positions[i]), np.asarray(path.positions[j])),
            expected,
            rtol=1e-9,
            atol=1e-20,
        )
    np.testing.assert_array_equal(path.times, [0, 0.5, 1])


def test_orbax_in_threads(tmp_path):
    """What Python does with an error that nobody catches is as before."""
    members, before = small(members=3, links=2), (sys.excepthook, sys.unraisablehook)
    for (j, i), arrays in parameters(members):
        place = (tmp_path / f"seed{i}" / f"step{j}").resolve()
        tree = {key.replace("/", "_"): array for key, array in arrays.items()}
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(place, tree)
    for _ in range(3):
        path = esl.from_checkpoints(tmp_path)
        assert (sys.excepthook, sys.unraisablehook) == before
    found = squares(*np.asarray(path.positions[:2]))
    np.testing.assert_allclose(found, squares(*members[:2]), rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_bfloat16(tmp_path):
    members = small(members=3, links=2).astype(ml_dtypes.bfloat16)
    path = esl.from_checkpoints(written(tmp_path / "run", members))
    wide = members.astype(np.float64)
    np.testing.assert_allclose(
        squares(np.asarray(path.positions[0]), np.asarray(path.positions[2])),
        squares(wide[0], wide[2]),
        rtol=1e-9,
    )
    coarse = esl.speed_limit(path, transport=esl.ExactTransport()).evidence.quantum
    assert coarse > 1e-3 * np.sqrt(np.mean(wide**2))  # eight bits of a number


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("save", [np.save, np.savez], ids=["npy", "npz"])
def test_a_file_of_snapshots(tmp_path, save):
    members = walk("noisy", links=3, d=900).astype(np.float32)
    file = tmp_path / ("run.npy" if save is np.save else "run.npz")
    save(file, members) if save is np.save else save(file, positions=members, times=[0, 1, 2, 4])
    path = esl.from_checkpoints(file, memory=4 * 4 * 5 * 4 * 64.0)
    expected = esl.from_snapshots(members.astype(np.float64), path.times)
    reports = [esl.speed_limit(run, transport=TRANSPORTS[0]) for run in (path, expected)]
    check_equal(*reports)
    assert path.keys is None
    assert path.times[2] == pytest.approx(2 / 3 if save is np.save else 0.5)


@pytest.mark.usefixtures("x64")
def test_principal_directions_of_all_pairs(recorded):
    """The run in its four principal coordinates."""
    whole, path = in_memory(recorded), esl.from_checkpoints(recorded, all_pairs=True)
    reports = []
    for run in (path, whole):
        matrix = esl.principal_directions(run.positions, 4)
        transport = esl.ProjectedTransport(esl.ExactTransport(), matrix)
        reports.append(esl.speed_limit(run, transport=transport))
    check_equal(*reports)
    ours, theirs = ([finding.name for finding in report.diagnose()] for report in reports)
    assert ours == theirs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, {"by_key": False}, {"all_pairs": True}], ids=str)
@pytest.mark.parametrize("coordinates", [3, 40])
def test_random_directions(recorded, options, coordinates):
    """Those of members in memory, drawn in blocks: numbers, errors, findings, shares of parameters.

    Some parameters have fewer numbers than there are directions.
    """
    whole, key = in_memory(recorded), jax.random.key(7)
    path = esl.from_checkpoints(
        recorded, coordinates=coordinates, key=key, memory=MEMORY, **options
    )
    matrix = esl.random_directions(sum(SIZES.values()), coordinates, key)
    theirs, ours = (
        esl.speed_limit(
            run, transport=esl.ProjectedTransport(esl.ExactTransport(), held), debias=True
        )
        for run, held in ((whole, matrix), (path, path.folded.directions))
    )
    check_equal(ours, theirs)
    assert [finding.name for finding in ours.diagnose()] == [
        finding.name for finding in theirs.diagnose()
    ]
    np.testing.assert_allclose(ours.evidence.distances, theirs.evidence.distances, rtol=1e-9)
    along, expected = (
        np.asarray(run.positions @ held)
        for run, held in ((path, path.folded.directions), (whole, matrix))
    )
    np.testing.assert_allclose(
        along - along[0].mean(axis=0), expected - expected[0].mean(axis=0), rtol=1e-9, atol=1e-9
    )
    flat = np.asarray(whole.positions).reshape(-1, sum(SIZES.values()))
    np.testing.assert_allclose(path.folded.spread, np.sum((flat - flat.mean(axis=0)) ** 2))
    if "by_key" not in options:
        for own, expected in zip(ours.by_key(), theirs.by_key(), strict=True):
            assert own[:2] == expected[:2]
            np.testing.assert_allclose(own[2:], expected[2:], rtol=1e-7)
    # The same fold knows the distances of all numbers as well.
    plain = [esl.speed_limit(run, transport=esl.ExactTransport()) for run in (path, whole)]
    check_equal(*plain)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", KINDS)
def test_coordinates_along_directions(tmp_path, kind):
    """Of any motion, between neighbors and from the start; what is at rest does not move at all."""
    members, key = walk(kind, links=4), jax.random.key(1)
    np.save(tmp_path / "run.npy", members)
    path = esl.from_checkpoints(
        tmp_path / "run.npy", coordinates=5, key=key, memory=4 * 5 * 5 * 8 * 77.0
    )
    matrix = np.asarray(esl.random_directions(300, 5, key))
    few = np.asarray(path.positions)
    ours = few @ np.asarray(path.folded.directions)
    for i, j in near(4):
        expected = squares(members[i] @ matrix, members[j] @ matrix)
        found = squares(ours[i], ours[j])
        rounding = 1e-14 * np.sqrt(expected) * np.abs(members).max() * np.sqrt(300)
        np.testing.assert_array_less(np.abs(found - expected), 1e-9 * expected + rounding + 1e-25)
    # With the signs of the directions.
    start = members[0].mean(axis=0)
    np.testing.assert_allclose(
        ours - ours[0].mean(axis=0), (members - start) @ matrix, rtol=1e-9, atol=1e-9
    )
    if kind == "at rest":
        np.testing.assert_array_equal(few[3], few[2])


def test_random_directions_are_drawn_in_blocks():
    """The same numbers, wherever a block begins and however long it is."""
    key, rows = jax.random.key(3), jax.random.normal
    whole = np.asarray(normal_rows(key, 3, 0, 10000))
    for first, count in ((0, 1), (1, 4095), (4095, 2), (4096, 4096), (5000, 5000), (9999, 1)):
        part = normal_rows(key, 3, first, count)
        np.testing.assert_array_equal(part, whole[first : first + count])
    # Small members keep the directions that they always had.
    np.testing.assert_array_equal(whole[:4096], rows(key, (4096, 3), np.float32))
    matrix = np.asarray(esl.random_directions(10000, 3, key), np.float64)
    spanned = np.linalg.lstsq(matrix, whole, rcond=None)[0]
    np.testing.assert_allclose(matrix @ spanned, whole, atol=1e-4)
    assert abs(np.corrcoef(whole[:4096].ravel(), whole[4096:8192].ravel())[0, 1]) < 0.05


@pytest.mark.usefixtures("x64")
def test_all_parameters_in_one_fold(recorded):
    path = esl.from_checkpoints(recorded, by_key=False, memory=MEMORY)
    assert path.positions.shape == (5, 8, 32)
    reports = [esl.speed_limit(run, transport=TRANSPORTS[0]) for run in (path, in_memory(recorded))]
    check_equal(*reports)


@pytest.mark.parametrize("coordinates", [0, 3])
def test_a_killed_run_goes_on_to_the_same_bits(recorded, tmp_path, coordinates):
    """Wherever it ended, and whatever the size of the pieces before."""
    along: Any = {"coordinates": coordinates, "key": jax.random.key(0)} if coordinates else {}
    whole = esl.from_checkpoints(recorded, memory=MEMORY, **along)
    file = tmp_path / "sums"
    for last in (1, 3, 9):
        reads = []

        def end(done, total, last=last, reads=reads):
            reads.append(done)
            if len(reads) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            esl.from_checkpoints(recorded, memory=MEMORY, sums=file, progress=end, **along)
        assert file.exists()
        after = []

        def note(done, total, after=after):
            after.append((done, total))

        again = esl.from_checkpoints(recorded, memory=MEMORY, sums=file, progress=note, **along)
        assert after[0][0] > reads[-1]
        assert after[-1] == (4 * 5 * 8 * sum(SIZES.values()),) * 2
        np.testing.assert_array_equal(again.positions, whole.positions)
        for one, other in zip(
            jax.tree.leaves(again.folded), jax.tree.leaves(whole.folded), strict=True
        ):
            np.testing.assert_array_equal(one, other)
        assert not file.exists()


def test_sums_of_another_recording_are_no_start(tmp_path):
    """A file that has changed since begins anew."""
    folder, file = written(tmp_path / "run", small(members=3)), tmp_path / "sums"

    def end(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        esl.from_checkpoints(folder, sums=file, progress=end)
    written(tmp_path / "other", small(members=3, seed=1))
    changed = folder / "seed1" / "step0" / "model.safetensors"
    changed.write_bytes((tmp_path / "other/seed1/step0/model.safetensors").read_bytes())
    path = esl.from_checkpoints(folder, sums=file)
    np.testing.assert_array_equal(path.positions, esl.from_checkpoints(folder).positions)


def test_sums_along_other_directions_are_no_start(recorded, tmp_path):
    def end(done, total):
        raise KeyboardInterrupt

    file, one, other = tmp_path / "sums", *(jax.random.key(seed) for seed in (0, 1))
    with pytest.raises(KeyboardInterrupt):
        esl.from_checkpoints(recorded, sums=file, progress=end, coordinates=3, key=one)
    path = esl.from_checkpoints(recorded, sums=file, coordinates=3, key=other)
    whole = esl.from_checkpoints(recorded, coordinates=3, key=other)
    np.testing.assert_array_equal(path.folded.directions, whole.folded.directions)


def interrupted(done, total):
    raise KeyboardInterrupt


def test_a_file_of_others_is_not_replaced(recorded, tmp_path, refused):
    """Nor removed at the end; nothing is read before."""
    theirs, link, pipe = (tmp_path / name for name in ("theirs", "link", "pipe"))
    theirs.write_bytes(b"theirs")
    link.symlink_to(theirs)
    os.mkfifo(pipe)
    for place in (theirs, link, pipe, tmp_path):
        refused(
            lambda place=place: esl.from_checkpoints(recorded, sums=place, progress=interrupted),
            "`sums` must be where nothing but results of esljax is replaced",
        )
    assert theirs.read_bytes() == b"theirs"
    assert link.is_symlink()
    missing = tmp_path / "none" / "sums"
    refused(lambda: esl.from_checkpoints(recorded, sums=missing), "in a folder that exists")
    refused(lambda: esl.from_checkpoints(recorded, sums=3), "`sums` must be a path")


def ended(folder, file, **more):
    """The sums of a run that was ended after its first block."""
    with pytest.raises(KeyboardInterrupt):
        esl.from_checkpoints(folder, sums=file, progress=interrupted, **more)
    return file.read_bytes()


@pytest.mark.parametrize("how", ["head", "half", "end", "numbers", "none"])
def test_damaged_sums_are_no_start(recorded, tmp_path, how):
    file = tmp_path / "sums"
    content = ended(recorded, file)
    middle = len(content) // 2
    file.write_bytes(
        {
            "head": content[:40],
            "half": content[:middle],
            "end": content[:-30],
            "numbers": content[:middle] + b"\xff" * 50 + content[middle + 50 :],
            "none": content[: content.index(b"PK")],
        }[how]
    )
    path = esl.from_checkpoints(recorded, sums=file)
    np.testing.assert_array_equal(path.positions, esl.from_checkpoints(recorded).positions)
    assert not file.exists()


def test_sums_of_any_size_are_saved_again(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("esljax.files.writing._LONGEST", 1000)
    monkeypatch.setattr("esljax.simulation.streaming._EVERY", 0.0)
    file = tmp_path / "sums"
    assert len(ended(recorded, file, memory=MEMORY)) > 1000
    esl.from_checkpoints(recorded, sums=file, memory=MEMORY)


def test_sums_that_cannot_be_written(recorded, tmp_path, monkeypatch, refused):
    """The reason that the run ended counts, and the sums before stay."""

    def full(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "sums"
    content = ended(recorded, file)
    monkeypatch.setattr("esljax.files.writing.replace", full)
    with pytest.raises(KeyboardInterrupt):
        esl.from_checkpoints(recorded, sums=file, progress=interrupted)
    monkeypatch.setattr("esljax.simulation.streaming._EVERY", 0.0)
    refused(lambda: esl.from_checkpoints(recorded, sums=file), "sums gives: No space left")
    assert file.read_bytes() == content


def test_a_recording_that_is_refused_leaves_no_sums(tmp_path, refused):
    members, file = small(members=3), tmp_path / "sums"
    members[2, 1, 1200] = np.nan
    folder = written(tmp_path / "run", members)
    ended(folder, file)
    refused(lambda: esl.from_checkpoints(folder, sums=file), "not for member 1 at snapshot 2")
    assert not file.exists()


def test_a_file_within_a_checkpoint_that_changes_begins_anew(tmp_path):
    """Also where it is read whole and not in parts."""

    def packed(path, arrays):
        path.mkdir(parents=True, exist_ok=True)
        for k, (key, array) in enumerate(arrays.items()):
            np.savez_compressed(path / f"part{'ab'[k % 2]}{k // 2}.npz", **{key: array})

    folder, file = written(tmp_path / "run", small(members=3), packed), tmp_path / "sums"
    ended(folder, file, only="*")
    written(folder, small(members=3, seed=1), packed)
    path = esl.from_checkpoints(folder, sums=file, only="*")
    whole = esl.from_checkpoints(folder, only="*")
    np.testing.assert_array_equal(path.positions, whole.positions)


def test_a_recording_that_changes_while_it_is_read(tmp_path, refused):
    folder = written(tmp_path / "run", small(members=3))
    again = folder / "seed1" / "step100" / "model.safetensors"

    def change(done, total):
        os.utime(again, ns=(0, done))

    refused(
        lambda: esl.from_checkpoints(folder, progress=change),
        "stay as it is while it is read, but .*seed1/step100/model.safetensors has changed",
    )

    def remove(done, total):
        again.unlink(missing_ok=True)

    refused(lambda: esl.from_checkpoints(folder, progress=remove), "No such file")


def test_times_are_checked_before_anything_is_read(recorded, refused):
    for times, sentence in (([0, 1], "shape"), ([0, 1, 2, 4, 3], "increase")):
        refused(
            lambda times=times: esl.from_checkpoints(recorded, times, progress=interrupted),
            sentence,
        )


@pytest.mark.usefixtures("x64")
def test_parameters_without_numbers_and_of_many_types(tmp_path):
    """As of the members in memory: types of which NumPy knows none in which all fit."""
    types = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float32")
    random = np.random.default_rng(0)
    for i, kind in enumerate(types):
        for step in range(3):
            arrays = {"b": random.normal(size=(4, 50)), "c": random.normal(size=()), "a": [[]]}
            safetensors_of(
                tmp_path / f"seed{i}" / f"step{step}",
                {key: np.asarray(array).astype(kind) for key, array in arrays.items()},
            )
    path, held = esl.from_checkpoints(tmp_path), esl.recordings.read(tmp_path)
    assert held.positions.dtype == np.float32
    whole = esl.from_snapshots(held.positions.astype(np.float64), keys=held.keys)
    ours, theirs = (esl.speed_limit(run, transport=TRANSPORTS[0]) for run in (path, whole))
    check_equal(ours, theirs)
    assert {share.key: share.coordinates for share in ours.by_key()} == {"a": 0, "b": 200, "c": 1}


def test_copies_and_common_parameters_are_found(tmp_path):
    """Members that are equal count once, and a parameter that all share is named."""
    members = small(members=10)
    members[:, 7] = members[:, 2]
    members[:, :, 7:367] = members[:, :1, 7:367]
    report = esl.speed_limit(
        esl.from_checkpoints(written(tmp_path / "run", members)), transport=TRANSPORTS[0]
    )
    assert int(report.evidence.labels.distinct) == 9
    findings = {finding.name: finding.evidence for finding in report.diagnose()}
    assert "all of `head/kernel`, 360 of 1367" in findings["common coordinates"]


def test_rounding_of_the_fold_is_counted(tmp_path):
    """In single precision a fold rounds what the members hold exactly."""
    start = np.random.default_rng(5).normal(size=(8, 5000))
    members = start + 3e-7 * np.random.default_rng(6).normal(size=(5, 8, 5000)).cumsum(axis=0)
    members = members.astype(np.float32)
    np.save(tmp_path / "run.npy", members)
    exact = 4 * np.mean(np.sum(np.diff(members.astype(float), axis=0) ** 2, axis=2), axis=1).sum()
    whole, folded = (
        esl.speed_limit(run, transport=esl.ExactTransport())
        for run in (esl.from_snapshots(members), esl.from_checkpoints(tmp_path / "run.npy"))
    )
    added = float(folded.evidence.rounding)
    assert added > 1.5 * float(whole.evidence.rounding)
    assert abs(float(folded.entropy_production) - exact) < added
    assert "rounded positions" in [finding.name for finding in folded.diagnose()]


def test_labels_that_do_not_follow_members_are_put_back(tmp_path):
    """As of the members themselves: a file in which some snapshots are in another order."""
    members = small(members=16, links=6)
    members[1:] = members[:1] + 0.1 * (members[1:] - members[:1])
    order = np.random.default_rng(0).permutation(16)
    mixed = members.copy()
    mixed[3] = members[3][order]
    given, path = (
        esl.speed_limit(
            esl.from_checkpoints(written(tmp_path / name, run)), transport=TRANSPORTS[0]
        )
        for name, run in (("given", members), ("mixed", mixed))
    )
    np.testing.assert_allclose(path.entropy_production, given.entropy_production, rtol=1e-4)
    assert path.evidence.labels is not None


# What is refused


def test_what_needs_the_members_is_refused(recorded, refused):
    path = esl.from_checkpoints(recorded)
    exact = esl.ExactTransport()

    def measure(transport, **more):
        return lambda: esl.speed_limit(path, transport=transport, **more)

    directions = esl.random_directions(path.positions.shape[2], 3, jax.random.key(0))
    sliced = esl.SlicedTransport(directions=4, key=jax.random.key(0))
    refused(measure(sliced), "look at distances between members alone")
    refused(measure(esl.MappedTransport(exact, lambda x: x)), "look at distances")
    refused(measure(esl.ProjectedTransport(exact, directions)), "all_pairs=True")
    along = esl.from_checkpoints(recorded, coordinates=3, key=jax.random.key(0))
    other = esl.ProjectedTransport(exact, 2 * along.folded.directions)
    refused(lambda: esl.speed_limit(along, transport=other), "other than `folded.directions`")
    refused(measure(exact, velocity=esl.TransportVelocity(exact)), "`velocity` must be None")
    refused(
        lambda: esl.free_energy(path, esl.Quadratic(1.0), entropy=esl.density.GaussianEntropy()),
        "hold the members themselves",
    )


@pytest.mark.parametrize("where", [(0, 2, 100), (3, 1, 1200), (2, 4, 3), (0, 3, 5)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite(tmp_path, refused, where, value):
    """The first one, whatever is not finite after it, without a warning of NumPy."""
    members = small()
    members[where] = members[1:, 0, where[2]] = value
    if where[0]:
        members[: where[0], 0, where[2]] = members[where[0], 0, where[2]] = 0
    folder = written(tmp_path / "run", members)
    sentence = f"is not for member {where[1]} at snapshot {where[0]}"
    refused(lambda: esl.from_checkpoints(folder), sentence)


def test_squares_that_overflow(tmp_path, refused):
    """Are no members that are not finite."""
    np.save(tmp_path / "run.npy", 1e200 * walk("noisy", links=2))
    refused(lambda: esl.from_checkpoints(tmp_path / "run.npy"), "squares double precision can add")


def test_bad_input(tmp_path, recorded, refused):
    refused(lambda: esl.from_checkpoints(tmp_path / "none"), "does not exist")
    refused(lambda: esl.from_checkpoints(recorded, memory=0.0), "greater than 0")
    refused(lambda: esl.from_checkpoints(recorded, memory=np.inf), "`memory` must be finite")
    refused(lambda: esl.from_checkpoints(recorded, memory="1 GB"), "`memory` must be a number")
    refused(lambda: esl.from_checkpoints(recorded, coordinates=3), "`key` must be made by")
    refused(lambda: esl.from_checkpoints(recorded, coordinates=-1), "integer of at least 0")
    key = jax.random.key(0)
    refused(
        lambda: esl.from_checkpoints(recorded, coordinates=2000, key=key), "must be at most 1367"
    )
    np.save(tmp_path / "flat.npy", np.zeros((3, 4)))
    refused(lambda: esl.from_checkpoints(tmp_path / "flat.npy"), "of shape")
    np.save(tmp_path / "one.npy", np.zeros((3, 1, 4)))
    refused(lambda: esl.from_checkpoints(tmp_path / "one.npy"), "at least two members")


# The command


@pytest.mark.usefixtures("precision_restored")
@pytest.mark.parametrize("project", ["none", "pca", "random"])
def test_the_command_reads_in_blocks(restless, tmp_path, capsys, project):
    reports = []
    for stream in ("yes", "no"):
        out = tmp_path / stream
        words = ["measure", str(restless), "--dtype", "float64", "--stream", stream]
        words += ["--project", project, "--coordinates", "3", "--out", str(out)]
        assert cli.main(words) == 0
        reports.append(json.loads((out / "report.json").read_text()))
        assert sorted(path.name for path in out.iterdir()) == [
            "config.toml",
            "report.json",
            "speed_limit.png",
        ]
    ours, theirs = reports
    printed = capsys.readouterr().out
    assert ("read in blocks and folded into" in printed) is True
    assert (ours["coordinates"], theirs["folded"]) == (sum(SIZES.values()), None)
    assert ours["projection"]["coordinates"] == theirs["projection"]["coordinates"]
    # The members in memory are of single precision.
    for name in ("entropy_production", "w2_squared", "debiased_w2_squared"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-3 if "debiased" in name else 1e-6)
    shares = [report["projection"].get("variance_share") for report in reports]
    assert shares[0] == (shares[1] and pytest.approx(shares[1], rel=1e-6))
    assert [share["key"] for share in ours["by_key"]] == [
        share["key"] for share in theirs["by_key"]
    ]


@pytest.mark.usefixtures("precision_restored")
def test_a_command_that_was_ended_goes_on(recorded, tmp_path, monkeypatch, capsys):
    out, reads, problems = tmp_path / "out", [], []
    call = ["measure", str(recorded), "--out", str(out), "--stream", "yes", "--quiet"]

    def end(bar, done, total):
        reads.append(done)
        if len(reads) == 1:
            raise KeyboardInterrupt

    def solved(bar, done, total):
        problems.append((done, total))

    monkeypatch.setattr("esljax.command.progress.MeasureBar.read", end)
    monkeypatch.setattr("esljax.command.progress.MeasureBar.solved", solved)
    assert cli.main(call) == 130
    assert [path.name for path in out.iterdir()] == ["sums.part"]
    assert "the same command goes on from " in capsys.readouterr().err
    assert cli.main(call) == 0
    # Each parameter is a block.
    assert reads == (4 * 5 * 8 * np.cumsum(list(SIZES.values()))).tolist()
    assert not (out / "sums.part").exists()
    # Debiased by halves, of all members and without each pair of them.
    total = 5 * (4 + 1 + 2 + 5 + 5)
    assert (problems[0], problems[-1]) == ((0, total), (total, total))


@pytest.mark.usefixtures("precision_restored")
def test_the_command_reads_in_blocks_what_is_large(recorded, tmp_path, monkeypatch):
    """By itself beyond a quarter of the memory, unless the members themselves are needed."""
    monkeypatch.setattr("esljax.command.measure.memory_of_the_machine", lambda: 4e5)

    def folded(*more):
        out = tmp_path / "_".join(("out", *more))
        assert cli.main(["measure", str(recorded), "--out", str(out), "--quiet", *more]) == 0
        return json.loads((out / "report.json").read_text())["folded"]

    assert folded() is not None
    assert folded("--transport", "sliced") is None
    # Whose files are elsewhere.
    linked = tmp_path / "linked"
    linked.mkdir()
    for member in recorded.iterdir():
        (linked / member.name).symlink_to(member)
    config = MeasureConfig(recording=linked, out=tmp_path)
    assert Measurement.of(config).path.folded is not None


@pytest.mark.usefixtures("precision_restored")
def test_the_command_refuses_too_many_coordinates_before_it_reads(
    recorded, tmp_path, capsys, monkeypatch
):
    def read(bar, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr("esljax.command.progress.MeasureBar.read", read)
    call = ["measure", str(recorded), "--out", str(tmp_path / "out"), "--stream", "yes"]
    assert cli.main([*call, "--project", "pca", "--coordinates", "41"]) == 2
    assert "at most 40, the members of all snapshots together" in capsys.readouterr().err


@pytest.mark.usefixtures("precision_restored")
@pytest.mark.parametrize(
    "words",
    [["--transport", "sliced"], ["--project", "matrix.npz"], ["--velocity", "transport"]],
    ids=lambda words: words[0],
)
def test_the_command_refuses_what_needs_the_members(recorded, tmp_path, capsys, words):
    call = ["measure", str(recorded), "--out", str(tmp_path / "out"), "--stream", "yes", *words]
    assert cli.main(call) == 2
    assert "--stream yes" in capsys.readouterr().err
