"""Runs that are killed, terminated, corrupted or moved to other devices resume to the same bits.

The last part kills real processes.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import PATIENCE

import esljax as esl
from esljax.files import TERMINATED, session
from esljax.files import checkpoints as module
from esljax.files.storage import versions

PROGRAM = Path(__file__).with_name("checkpointed_program.py")
KEY = jax.random.key(1)
START = np.asarray(jax.random.normal(jax.random.key(0), (6, 2)))


def run(checkpoints=None, *, rule=None, start=START, potential=None, key=KEY, **settings):
    potential = esl.Quadratic(1.0) if potential is None else potential
    rule = esl.Langevin(esl.Cosine(0.3), 0.1) if rule is None else rule
    settings = {"steps": 24, "snapshots": 6, **settings}
    return esl.simulate(potential, rule, start, key=key, checkpoints=checkpoints, **settings)


def same(one, other) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def noisy_parabola(x, key):
    return jnp.sum((x - 3 + 0.1 * jax.random.normal(key, x.shape)) ** 2), jnp.sum(x) - 5.0


def search(checkpoints=None, callback=None, objective=noisy_parabola, **settings):
    settings = {"iterations": 12, "key": KEY, **settings}
    return esl.optimize(
        objective, jnp.zeros(3), callback=callback, checkpoints=checkpoints, **settings
    )


class Stop(Exception):
    """Ends a search from within."""


def stopped_at(iteration: int):
    def callback(seen):
        if seen.iteration == iteration:
            raise Stop

    return callback


# In one process


def test_a_run_with_checkpoints_has_the_bits_of_one_without(tmp_path):
    same(run(), run(esl.Checkpoints(tmp_path / "run", every=0)))
    observed = {"observe": lambda member: member[:1] ** 2}
    same(run(**observed), run(esl.Checkpoints(tmp_path / "observed", every=0), **observed))


def test_a_run_of_many_snapshots_compiles_no_more_than_one_of_few(tmp_path, caplog):
    compiled = []
    for snapshots in (3, 12):
        caplog.clear()
        jax.clear_caches()
        with jax.log_compiles():
            run(esl.Checkpoints(tmp_path / f"{snapshots}", every=0), snapshots=snapshots)
        compiled.append(sum(record.message.startswith("Compiling") for record in caplog.records))
    assert compiled[0] == compiled[1] > 0


def test_a_search_with_checkpoints_has_the_bits_of_one_without(tmp_path):
    same(search(), search(esl.Checkpoints(tmp_path, every=0)))


def test_a_run_resumes_from_its_latest_checkpoint(tmp_path, monkeypatch):
    run(esl.Checkpoints(tmp_path, every=0))
    shutil.rmtree(tmp_path / "6")
    resumed = esl.Checkpoints(tmp_path, resume=True, every=0)
    same(run(), run(resumed))
    with session(resumed, {}) as opened:
        manager = opened._manager
    assert sorted(manager.all_steps()) == [5, 6]
    seen = []
    monkeypatch.setattr(
        module.Session, "offer", lambda self, step, state, last=False: seen.append(step)
    )
    shutil.rmtree(tmp_path / "6")
    run(resumed)
    assert seen == [6]


def test_a_search_resumes_from_its_latest_checkpoint(tmp_path):
    with pytest.raises(Stop):
        search(esl.Checkpoints(tmp_path, every=0), stopped_at(7))
    seen = []
    resumed = search(
        esl.Checkpoints(tmp_path, resume=True, every=0), lambda at: seen.append(at.iteration)
    )
    same(search(), resumed)
    assert seen == [7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    "objective",
    [
        lambda x, key: noisy_parabola(x, key)[0],
        lambda x, key: (noisy_parabola(x, key)[0], (), jnp.sum(x)),
    ],
    ids=["a scalar alone", "auxiliary without residuals"],
)
def test_a_search_without_constraints_resumes(tmp_path, objective):
    with pytest.raises(Stop):
        search(esl.Checkpoints(tmp_path, every=0), stopped_at(7), objective)
    same(
        search(objective=objective),
        search(esl.Checkpoints(tmp_path, resume=True, every=0), objective=objective),
    )


def test_an_optimizer_with_a_key_resumes(tmp_path):
    settings = {"optimizer": optax.noisy_sgd(0.01, key=jax.random.key(5)), "iterations": 6}
    with pytest.raises(Stop):
        search(esl.Checkpoints(tmp_path, every=0), stopped_at(3), **settings)
    same(search(**settings), search(esl.Checkpoints(tmp_path, resume=True, every=0), **settings))


@pytest.mark.usefixtures("x64")
def test_a_history_is_restored_in_double_precision(tmp_path):
    """The norm of the gradient has more digits than a value in half precision."""

    def objective(x, key):
        return (noisy_parabola(x, key)[0].astype(jnp.float16), jnp.sum(x) - 5.0)

    with pytest.raises(Stop):
        search(esl.Checkpoints(tmp_path, every=0), stopped_at(7), objective)
    same(
        search(objective=objective),
        search(esl.Checkpoints(tmp_path, resume=True, every=0), objective=objective),
    )


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    first = search(esl.Checkpoints(tmp_path, every=0))
    same(first, search(esl.Checkpoints(tmp_path, resume=True), stopped_at(0)))


def test_checkpoints_wait_until_they_are_due(tmp_path):
    run(esl.Checkpoints(tmp_path, every=3600))
    assert [path.name for path in tmp_path.iterdir()] == ["6"]  # the last one is always saved


def as_0_1_saved_it(folder, **digests):
    """Rewrite the descriptions of a run as version 0.1 did: without a format."""
    for path in folder.glob("*/about/metadata"):
        about = json.loads(path.read_text())
        assert about.pop(module._FORMAT)
        path.write_text(json.dumps(about | digests))


def test_a_checkpoint_of_0_1_is_resumed(tmp_path):
    run(esl.Checkpoints(tmp_path, every=0))
    as_0_1_saved_it(tmp_path)
    shutil.rmtree(tmp_path / "6")
    same(run(), run(esl.Checkpoints(tmp_path, resume=True, every=0)))


def test_a_checkpoint_of_0_1_with_other_digests_is_rejected(tmp_path, refused):
    run(esl.Checkpoints(tmp_path))
    as_0_1_saved_it(tmp_path, rule="Langevin 0123456789ab")
    refused(
        lambda: run(esl.Checkpoints(tmp_path, resume=True)),
        "whose rule is Langevin 0123456789ab, not Langevin .*an earlier esljax saved it",
    )
    refused(
        lambda: run(esl.Checkpoints(tmp_path, resume=True), steps=48),
        "whose steps is 24, not 48 .*use another folder",
    )


@pytest.mark.parametrize("part", ["state", "about"])
def test_half_written_checkpoints_are_ignored_and_broken_ones_skipped(tmp_path, part):
    run(esl.Checkpoints(tmp_path, every=0))
    # A writer that dies leaves folders of such names behind.
    for half in ("7.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-1234"):
        shutil.copytree(tmp_path / "6", tmp_path / half)
    for path in (tmp_path / "6" / part).rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    with pytest.warns(RuntimeWarning, match="round 6 .* cannot be read and is skipped"):
        same(run(), run(esl.Checkpoints(tmp_path, resume=True, every=0)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]


@pytest.mark.parametrize("description", ["[]", '{"sums of the state": 3}'])
def test_a_checkpoint_whose_description_is_damaged_is_skipped(tmp_path, description):
    run(esl.Checkpoints(tmp_path, every=0))
    (tmp_path / "6" / "about" / "metadata").write_text(description)
    with pytest.warns(RuntimeWarning, match="round 6 .* skipped: its description is damaged"):
        same(run(), run(esl.Checkpoints(tmp_path, resume=True, every=0)))


def test_a_folder_without_readable_checkpoints_is_rejected(tmp_path, refused):
    run(esl.Checkpoints(tmp_path, every=0))
    for folder in ("5", "6"):
        for path in (tmp_path / folder).rglob("*"):
            if path.is_file():
                os.truncate(path, 0)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        refused(
            lambda: run(esl.Checkpoints(tmp_path, resume=True)),
            "hold at least one checkpoint that can be read, but .* delete its contents to start",
        )


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"rule": esl.Langevin(esl.Cosine(0.2), 0.1)}, "whose rule is Langevin"),
        ({"rule": esl.Langevin(esl.Constant(0.3), 0.1)}, "whose rule is Langevin"),
        ({"potential": esl.Quadratic(2.0)}, "whose potential is Quadratic"),
        ({"start": START + 1}, "whose positions is float32"),
        ({"start": START[:4]}, r"whose positions is float32\[6, 2\] .*, not float32\[4, 2\]"),
        ({"key": jax.random.key(2)}, "whose key is"),
        ({"steps": 48}, "whose steps is 24, not 48"),
        ({"snapshots": 3}, "whose snapshots is 6, not 3"),
        ({"observe": jnp.sin}, "whose observe is None, not "),
    ],
)
def test_another_run_is_rejected(tmp_path, refused, other, sentence):
    run(esl.Checkpoints(tmp_path, every=0))
    refused(
        lambda: run(esl.Checkpoints(tmp_path, resume=True), **other),
        sentence + ".*use another folder",
    )


def test_another_version_is_rejected(tmp_path, refused, monkeypatch):
    run(esl.Checkpoints(tmp_path))
    monkeypatch.setattr(module, "versions", lambda: {**versions(), "jax": "0.1"})
    refused(
        lambda: run(esl.Checkpoints(tmp_path, resume=True)),
        r"whose version of jax is \S+, not 0.1 \(install that version to resume it\)",
    )


def test_another_search_is_rejected(tmp_path, refused):
    search(esl.Checkpoints(tmp_path))

    def steeper(x, key):
        return 2 * noisy_parabola(x, key)[0]

    again = esl.Checkpoints(tmp_path, resume=True)
    refused(
        lambda: search(again, objective=steeper),
        "whose objective is noisy_parabola .*, not .*steeper",
    )
    refused(lambda: search(again, iterations=13), "whose iterations is 12, not 13")


def test_bad_input_is_one_sentence(tmp_path, refused):
    run(esl.Checkpoints(tmp_path / "used"))
    refused(
        lambda: run(esl.Checkpoints(tmp_path / "used")),
        "be a folder without a run, or have resume=True .* holds a run at round 6",
    )
    (tmp_path / "file").touch()
    refused(lambda: esl.Checkpoints(3), "`folder` must be the path of a folder, but is 3")
    refused(lambda: esl.Checkpoints(tmp_path / "file"), "`folder` must be a folder, but .* a file")
    refused(
        lambda: esl.Checkpoints("gs://bucket/run"),
        "`folder` must be a folder of a mounted file system, but is the address gs:",
    )
    refused(lambda: esl.Checkpoints(tmp_path, every=-1), "`every` must be at least 0")
    refused(lambda: run(str(tmp_path)), "`checkpoints` must be Checkpoints")
    gradient = jax.grad(
        lambda rate: jnp.sum(
            run(esl.Checkpoints(tmp_path / "new"), rule=esl.Langevin(rate, 0.1)).final
        )
    )
    refused(lambda: gradient(0.1), "left out inside jit, grad and vmap")


def test_two_runs_do_not_write_one_folder(tmp_path, refused):
    again = esl.Checkpoints(tmp_path, resume=True)
    with session(again, {}):
        refused(
            lambda: run(again),
            f"`checkpoints` must have no other writer, but process {os.getpid()} of .* is writing",
        )
    run(again)
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_a_run_killed_on_another_host_resumes_on_this_one(tmp_path):
    """Nobody is there to delete the lock that it left behind."""
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "another"}')
    run(esl.Checkpoints(tmp_path, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_a_terminated_run_is_saved_first(tmp_path):
    def callback(seen):
        if seen.iteration == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(esl.Terminated, match="Terminated after round 5; the run is saved") as ended:
        search(esl.Checkpoints(tmp_path, every=3600), callback)
    assert ended.value.code == TERMINATED == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    same(search(), search(esl.Checkpoints(tmp_path, resume=True)))


def disturbed(monkeypatch, disturb):
    """Call `disturb` with the round whenever one is saved, before it is written."""
    orbax = module._orbax()

    class Disturbed(orbax.CheckpointManager):
        def save(self, step, **settings):
            disturb(step)
            return super().save(step, **settings)

    monkeypatch.setattr(orbax, "CheckpointManager", Disturbed)


def test_terminated_during_the_last_save_it_ends(tmp_path, monkeypatch):
    disturbed(monkeypatch, lambda step: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(esl.Terminated, match="Terminated; the run is saved"):
        run(esl.Checkpoints(tmp_path, every=3600))
    monkeypatch.undo()
    same(run(), run(esl.Checkpoints(tmp_path, resume=True)))


def test_terminated_while_a_finished_run_is_read_it_ends(tmp_path, monkeypatch):
    run(esl.Checkpoints(tmp_path))
    restore = module.Session.restore

    def terminated(self, like):
        os.kill(os.getpid(), signal.SIGTERM)
        return restore(self, like)

    monkeypatch.setattr(module.Session, "restore", terminated)
    with pytest.raises(esl.Terminated, match="Terminated; the run is saved"):
        run(esl.Checkpoints(tmp_path, resume=True))


@pytest.fixture
def interruptible():
    """The usual handler of Ctrl-C: a process in the background of a script inherits none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_checkpoint_being_written(tmp_path, monkeypatch):
    disturbed(monkeypatch, lambda step: step == 5 and os.kill(os.getpid(), signal.SIGINT))
    optimum = search(esl.Checkpoints(tmp_path, every=0))
    assert optimum.interrupted
    assert len(optimum.history.value) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "5"]
    monkeypatch.undo()
    same(search(), search(esl.Checkpoints(tmp_path, resume=True)))


def test_a_full_disk_does_not_end_the_search(tmp_path, monkeypatch):
    def full(step):
        if step in (5, 6, 12):
            (tmp_path / f"{step}.orbax-checkpoint-tmp").mkdir()
            raise ValueError("No space left on device\nand a long account of it")

    disturbed(monkeypatch, full)
    with pytest.warns(
        RuntimeWarning,
        match="^The checkpoint of round .* cannot be written: No space left on device$",
    ) as warned:
        same(search(), search(esl.Checkpoints(tmp_path, every=0)))
    assert [re.search(r"round (\d+)", str(warning.message)).group(1) for warning in warned] == [
        "5",
        "6",
        "12",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]
    monkeypatch.undo()
    same(search(), search(esl.Checkpoints(tmp_path, resume=True)))


@pytest.mark.parametrize(("terminated", "failing"), [(3, 4), (12, 12)])
def test_terminated_on_a_full_disk_it_names_the_round_that_is_saved(
    tmp_path, monkeypatch, terminated, failing
):
    def full(step):
        if step == terminated:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == failing:
            raise OSError("No space left on device")

    disturbed(monkeypatch, full)
    left = f"saved in .* up to round {failing - 1} and resumes from there"
    with (
        pytest.warns(RuntimeWarning, match=f"round {failing} .* cannot be written"),
        pytest.raises(esl.Terminated, match=left),
    ):
        search(esl.Checkpoints(tmp_path, every=0))


def test_an_interrupted_search_is_saved_and_returns_the_best_so_far(tmp_path):
    def callback(seen):
        if seen.iteration == 4:
            raise KeyboardInterrupt

    assert search(esl.Checkpoints(tmp_path, every=3600), callback).interrupted
    same(search(), search(esl.Checkpoints(tmp_path, resume=True)))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("from_where", ["step", "callback"])
def test_interrupted_in_the_first_iteration_it_returns_the_start(
    tmp_path, monkeypatch, saved, from_where
):
    def interrupt(*_):
        raise KeyboardInterrupt

    if from_where == "step":
        monkeypatch.setattr(optax.tree, "norm", interrupt)

    def alone(x, key):
        return noisy_parabola(x, key)[0]

    optimum = search(esl.Checkpoints(tmp_path) if saved else None, interrupt, alone)
    assert optimum.interrupted
    assert len(optimum.history.value) == (from_where == "callback")
    assert optimum.history.residuals.shape[1] == 0
    monkeypatch.undo()
    if saved:
        same(
            search(objective=alone), search(esl.Checkpoints(tmp_path, resume=True), objective=alone)
        )


# In real processes


def command(out: Path, folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(PROGRAM), str(out), str(folder), *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder / "out.npz", folder / "kept", environment)
    return dict(np.load(folder / "out.npz"))


def finish(out: Path, folder: Path, environment: dict[str, str], *more: str) -> None:
    subprocess.run(
        command(out, folder, *more),
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=PATIENCE,
    )


def killed_after(
    lines: int, seconds: float, out: Path, folder: Path, environment: dict[str, str], *more: str
) -> int:
    """Kill a process some seconds after it has printed some lines, and return its exit code."""
    with subprocess.Popen(
        command(out, folder, *more), env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in zip(range(lines), process.stdout, strict=False):
            pass
        time.sleep(seconds)
        process.kill()
    return process.returncode


def same_arrays(file: Path, expected: dict[str, np.ndarray]) -> None:
    with np.load(file) as other:
        assert set(other) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(other[name], array)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 40])
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    kills, tmp_path, undisturbed, environment
):
    out, moments = tmp_path / "out.npz", random.Random(kills)
    for i in range(kills):
        # The first line comes before anything is computed, the second after the simulation, and
        # each later one after a round of the search.
        lines = 1 if i < kills // 2 else moments.randint(2, 4)
        killed_after(
            lines,
            moments.uniform(0, 1.5 if lines == 1 else 0.1),
            out,
            tmp_path / "kept",
            environment,
        )
        if i == 0:
            assert not out.exists()
    finish(out, tmp_path / "kept", environment)
    same_arrays(out, undisturbed)


@pytest.mark.slow
def test_terminated_it_exits_with_its_own_code_and_resumes(tmp_path, undisturbed, environment):
    out = tmp_path / "out.npz"
    ended = command(out, tmp_path / "kept", "--pause", "0.2")
    with subprocess.Popen(ended, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("round 3"):
                process.terminate()
    assert process.returncode == TERMINATED
    finish(out, tmp_path / "kept", environment)
    same_arrays(out, undisturbed)


def test_it_resumes_on_other_devices(tmp_path, undisturbed, environment):
    out = tmp_path / "out.npz"
    assert (
        killed_after(2, 0, out, tmp_path / "kept", environment, "--devices", "8") == -signal.SIGKILL
    )
    # Without its last checkpoint the run has a link left.
    for step in sorted((tmp_path / "kept" / "run").glob("[0-9]*"), key=lambda path: int(path.name))[
        -1:
    ]:
        shutil.rmtree(step)
    finish(out, tmp_path / "kept", environment, "--devices", "4")
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["1"], undisturbed["1"])  # the positions
