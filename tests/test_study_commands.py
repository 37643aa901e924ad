"""The commands of studies: interrupted, killed, and spread over processes and machines that die."""

import gc
import importlib
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
import tomllib
from concurrent.futures import BrokenExecutor

import numpy as np
import pytest
from processes import PATIENCE, wait_until

import esljax as esl
from esljax.command import cli
from esljax.experiment import runs
from esljax.study import store as study_store

SMALL = """
[base]
data = "moons"
hidden = [4]
members = 6
steps = 10
snapshots = 5
batch_size = 32

[grid]
rate = [0.1, 0.4, 1.6]
seed = {range = [0, 8]}
"""
# Long enough a run to be met in the middle.
LONG = SMALL.replace("steps = 10", "steps = 2000")


pytestmark = pytest.mark.usefixtures("quick_compilation_of_all")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    (folder / "study.toml").write_text(SMALL)
    code = cli.main(["study", "run", str(folder / "study.toml"), "--task-size", "6"])
    return code, folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The store of the long study, run to its end at once."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "study.toml").write_text(LONG)
    assert (
        cli.main(["study", "run", str(folder / "study.toml"), "--task-size", "1", "--quiet"]) == 0
    )
    return folder / "study.zarr"


def command(*arguments):
    return [sys.executable, "-m", "esljax", "study", *map(str, arguments)]


def same(path, other):
    """Every number, reason and mark of two stores is the same, bit for bit."""
    found, wanted = esl.study.open_study(path).load(), esl.study.open_study(other).load()
    assert set(found.variables) == set(wanted.variables)
    for name in wanted.variables:
        np.testing.assert_array_equal(found[name].values, wanted[name].values, err_msg=name)


# --- The commands ---------------------------------------------------------------------------------


def test_run_writes_its_store_beside_the_file(small, capsys):
    code, folder = small
    assert code == 0
    results = esl.study.open_study(folder / "study.zarr")
    assert dict(results.sizes) == {"rate": 3, "seed": 8}
    assert (results["done"] == 1).all()
    assert results.attrs["task_size"] == 6
    assert cli.main(["study", "run", str(folder / "study.zarr")]) == 0
    assert "24 of 24 runs done in" in capsys.readouterr().out


def test_status(small, capsys):
    _, folder = small
    for named in ("study.toml", "study.zarr"):
        assert cli.main(["study", "status", str(folder / named)]) == 0
        printed = capsys.readouterr().out
        assert "24 runs (rate 3 × seed 8)" in printed
        assert "24 done, 0 failed, 0 to do" in printed


def test_show(small, capsys):
    _, folder = small
    assert cli.main(["study", "show", str(folder / "study.toml"), "--rows", "2"]) == 0
    printed = capsys.readouterr().out
    gap = esl.study.open_study(folder / "study.zarr")["gap"].sel(rate=0.1)
    row = next(line.split() for line in printed.splitlines() if line.startswith("0.1 "))
    assert row[1] == "8"
    value, error = re.fullmatch(r"([\d.]+)\((\d+)\)", row[5]).groups()
    scale = 10 ** -len(value.partition(".")[2])
    assert abs(float(value) - float(gap.mean())) < scale
    assert abs(int(error) * scale - float(gap.std(ddof=1)) / np.sqrt(8)) < scale
    assert "… and 1 more; --rows 3 shows all." in printed
    assert [line.split()[0] for line in printed.splitlines() if "(" in line] == ["0.1", "0.4"]


def test_plot(small, capsys):
    _, folder = small
    assert cli.main(["study", "plot", str(folder / "study.toml")]) == 0
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")
    assert "24 runs" in capsys.readouterr().out
    assert (
        cli.main(
            [
                "study",
                "plot",
                str(folder / "study.toml"),
                "--out",
                str(folder / "no" / "figure.png"),
            ]
        )
        == 2
    )
    assert "Argument `out` must be a figure that can be written" in capsys.readouterr().err


def test_failed_runs_are_listed_and_the_exit_code_is_1(tmp_path, capsys):
    (tmp_path / "study.toml").write_text(
        SMALL.replace("[0.1, 0.4, 1.6]", "[0.1, 1e30]").replace("[0, 8]", "[0, 3]")
    )
    assert cli.main(["study", "run", str(tmp_path / "study.toml")]) == 1
    printed = capsys.readouterr().out
    assert "3 of 6 runs done, 3 failed" in printed
    assert "3 failed: diverged: the final loss is nan" in printed
    cli.main(["study", "show", str(tmp_path / "study.toml")])
    assert re.search(r"^1e\+30 +0/3( +-){9}", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nowhere.toml"], "Argument `config` must be a readable file"),
        (["run", "bad.toml"], "Key `rates` of [base] of bad.toml is unknown"),
        (
            ["run", "study.toml", "--task-size", "0"],
            "Argument `task_size` must be an integer of at least 1",
        ),
        (
            ["run", "study.toml", "--processes", "-1"],
            "Argument `processes` must be an integer of at least 0",
        ),
        (
            ["run", "study.toml", "--processes", "2", "--slurm", "1"],
            "Argument `slurm` must be given without processes",
        ),
        (
            ["run", "study.toml", "--out", "study.toml"],
            "Argument `out` must be the store of a study",
        ),
        (
            ["run", "study.toml", "--scheduler", "tcp://127.0.0.1:9"],
            "Argument `scheduler` must be the address of a dask scheduler that answers",
        ),
        (
            ["run", "study.toml", "--scheduler", "no such"],
            "Argument `scheduler` must be the address of a dask scheduler",
        ),
        (
            ["status", "study.toml"],
            "Argument `path` must be the store of a study, but there is nothing at study.zarr",
        ),
        (["show", "nowhere.zarr"], "Argument `path` must be the store of a study"),
        (["plot", "."], "Argument `path` must be the store of a study"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(esl.study.executors, "_PATIENCE", 1)
    (tmp_path / "study.toml").write_text(SMALL)
    (tmp_path / "bad.toml").write_text("[base]\nrates = 3")
    assert cli.main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"esljax: {sentence}")
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"study.toml", "bad.toml"}, (
        "refused before anything is written"
    )


def test_unknown_command(capsys):
    assert cli.main(["study", "start"]) == 2
    assert "start" in capsys.readouterr().err
    assert cli.main(["study"]) == 2


# --- What ends it ---------------------------------------------------------------------------------


def begun(store, process, least=1):
    """Wait until a process has finished some runs of a store."""

    def happened():
        if store.exists() and int((esl.study.open_study(store)["done"] != 0).sum()) >= least:
            return True
        assert process.poll() is None, process.communicate()
        return False

    wait_until(happened, f"a run of {store}")


@pytest.mark.parametrize(
    ("processes", "number", "how", "code"),
    [
        (0, signal.SIGINT, "interrupted", 130),
        (0, signal.SIGTERM, "ended by SIGTERM", 143),
        pytest.param(2, signal.SIGINT, "interrupted", 130, marks=pytest.mark.slow),
        pytest.param(2, signal.SIGTERM, "ended by SIGTERM", 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_a_store_to_go_on_with(
    processes, number, how, code, tmp_path, environment, capsys
):
    (tmp_path / "study.toml").write_text(LONG.replace("2000", "20000"))
    arguments = command("run", "study.toml", "--task-size", "1", "--processes", processes)
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        begun(tmp_path / "study.zarr", process)
        assert cli.main(["study", "status", str(tmp_path / "study.toml")]) == 0
        assert re.search(
            rf"process {process.pid} of .* is running it, about \d+ (s|min) left",
            capsys.readouterr().out,
        )
        process.send_signal(number)
        _, error = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code, error
    assert re.fullmatch(
        rf"esljax: {how}; \d+ of 24 runs done in study.zarr, and the same command resumes "
        r"it\.\n",
        error,
    )
    assert not (tmp_path / "study.zarr.lock").exists()
    cli.main(["study", "status", str(tmp_path / "study.toml")])
    assert "nothing is running it; resume it by: esljax study run" in capsys.readouterr().out


def killed_again_and_again(folder, environment, kills):
    """Kill the study at random moments, then let it end; count the kills before its end."""
    store, codes = folder / "study.zarr", []
    for _ in range(kills):
        process = subprocess.Popen(
            command("run", "study.toml", "--task-size", "1", "--quiet"), cwd=folder, env=environment
        )
        # Some while it starts or makes the store, most in the middle of its tasks.
        if random.random() < 0.8:
            done = int((esl.study.open_study(store)["done"] != 0).sum()) if store.exists() else 0
            begun(store, process, least=min(done + random.randrange(4), 23))
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        codes.append(process.wait())
    subprocess.run(
        command("run", "study.toml", "--task-size", "1", "--quiet"),
        cwd=folder,
        env=environment,
        timeout=PATIENCE,
        check=True,
    )
    return codes.count(-signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 15])
def test_killed_at_random_moments_it_ends_with_the_same_bits(kills, whole, tmp_path, environment):
    (tmp_path / "study.toml").write_text(LONG)
    assert killed_again_and_again(tmp_path, environment, kills) >= 1
    same(tmp_path / "study.zarr", whole)
    contents = []
    for store in (tmp_path / "study.zarr", whole):
        contents.append(
            {
                path.relative_to(store): path.read_bytes()
                for path in store.rglob("*")
                if path.is_file()
            }
        )
        about = json.loads(contents[-1].pop((store / "zarr.json").relative_to(store)))
        assert about["attributes"].pop("created")
        checksums = json.loads(about["attributes"].pop("checksums"))
        assert checksums.pop(".")  # of the time of creation too
        contents[-1]["checksums"] = list(checksums.items())
        contents[-1]["about"] = about
    assert contents[0] == contents[1], "file by file"


# --- Where it runs --------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_of_this_machine_give_the_same_bits(whole, tmp_path, environment):
    (tmp_path / "study.toml").write_text(LONG)
    arguments = command("run", "study.toml", "--processes", "2", "--task-size", "1")
    done = subprocess.run(
        arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert "24 of 24 runs done in study.zarr" in done.stdout
    same(tmp_path / "study.zarr", whole)


class Dying(esl.study.executors.InProcess):
    """A pool whose worker dies at its second task."""

    def submit(self, fn, /, *args):
        self.tasks = getattr(self, "tasks", 0) + 1
        future = super().submit(fn, *args)
        if self.tasks == 2:
            future = type(future)()
            future.set_exception(BrokenExecutor("a child died"))
        return future


def test_a_pool_that_ends_early_is_reported(small, tmp_path):
    study = esl.study.Study.from_toml(small[1] / "study.toml")
    with pytest.raises(
        esl.study.LostWorkersError,
        match=r"The workers ended before the study did \(a child died\); what is done is kept",
    ):
        esl.study.run_study(study, tmp_path / "study.zarr", task_size=6, executor=Dying())
    assert int((esl.study.open_study(tmp_path / "study.zarr")["done"] == 1).sum()) == 6
    esl.study.run_study(study, tmp_path / "study.zarr")
    same(tmp_path / "study.zarr", small[1] / "study.zarr")


@pytest.fixture
def dask_cluster(tmp_path, environment, monkeypatch):
    """A scheduler and two workers in processes of their own: (address, workers)."""
    file, dask = tmp_path / "scheduler.json", [sys.executable, "-m", "dask"]
    quiet = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
    }
    processes = [
        subprocess.Popen(
            [
                *dask,
                "scheduler",
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--scheduler-file",
                str(file),
                "--no-dashboard",
            ],
            **quiet,
        )
    ]
    try:
        wait_until(file.exists, "the start of the scheduler")
        for name in ("first", "second"):
            worker = [
                "worker",
                "--scheduler-file",
                str(file),
                "--no-nanny",
                "--nthreads",
                "1",
                "--no-dashboard",
                "--name",
                name,
            ]
            processes.append(subprocess.Popen([*dask, *worker], **quiet))
        monkeypatch.setattr(esl.study.executors, "_PATIENCE", PATIENCE)
        yield json.loads(file.read_text())["address"], processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_dask_worker_that_is_killed_costs_nothing_but_time(
    dask_cluster, whole, tmp_path, monkeypatch
):
    """Of two real workers one is killed by SIGKILL in the middle of a task.

    Every run is there, written once, with the bits of this process.
    """
    address, workers = dask_cluster
    study = esl.study.Study.from_dict(tomllib.loads(LONG))
    written, killed = [], []
    plain = study_store.StudyStore.write
    monkeypatch.setattr(
        study_store.StudyStore,
        "write",
        lambda self, i, rows: written.extend(i.tolist()) or plain(self, i, rows),
    )

    def watch(progress):
        if progress.fresh >= 4 and not killed:
            workers[0].kill()
            killed.append(progress.fresh)

    with esl.study.executors.scheduler(address) as executor:
        esl.study.run_study(
            study, tmp_path / "study.zarr", executor=executor, task_size=1, watch=watch
        )
    assert killed
    assert killed[0] < 24
    assert workers[0].wait(timeout=PATIENCE) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert sorted(written) == list(range(24))
    same(tmp_path / "study.zarr", whole)


SBATCH = """#!/bin/sh
# A SLURM of one machine: the job script runs at once, in the background.
[ "$1" = --test-only ] && exit 0
script=$(mktemp)
cat "$1" > "$script"
setsid sh "$script" > /dev/null 2>&1 &
echo $! >> {folder}/jobs
echo "Submitted batch job $!"
"""
JOBS = {
    "cores": 1,
    "memory": "4GB",
    "processes": 1,
    "interface": "lo",
    "scheduler-options": {"dashboard_address": ":0"},
}


def put(path, script):
    path.write_text(script)
    path.chmod(stat.S_IRWXU)


@pytest.fixture
def machine(tmp_path, environment, monkeypatch):
    """The folder of an `sbatch` that runs its script here, found by this process."""
    import dask

    # The defaults of dask-jobqueue go before what is set here.
    importlib.import_module("dask_jobqueue")
    put(tmp_path / "sbatch", SBATCH.format(folder=tmp_path))
    put(tmp_path / "scancel", '#!/bin/sh\nkill -- -"$1"\n')
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{environment['PATH']}")
    monkeypatch.setattr(esl.study.executors, "_RENEWAL", 1)
    monkeypatch.setattr(esl.study.executors, "_PATIENCE", PATIENCE)
    with dask.config.set(
        {
            "jobqueue.slurm": {**dask.config.get("jobqueue.slurm"), **JOBS},
            "distributed.deploy.lost-worker-timeout": "1s",
        }
    ):
        yield tmp_path
    gc.collect()  # what dask has left open is not to surprise another test


# dask leaves the socket of a cluster to the garbage.
LEFT = pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")


@LEFT
@pytest.mark.slow
def test_slurm_jobs(small, machine):
    (machine / "jobqueue.yaml").write_text(json.dumps({"jobqueue": {"slurm": JOBS}}))
    (machine / "study.toml").write_text(SMALL)
    arguments = command("run", "study.toml", "--slurm", "2", "--task-size", "6")
    given = {**os.environ, "DASK_CONFIG": str(machine)}
    done = subprocess.run(
        arguments, cwd=machine, env=given, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    assert len((machine / "jobs").read_text().split()) == 2
    same(machine / "study.zarr", small[1] / "study.zarr")


@LEFT
@pytest.mark.slow
def test_slurm_jobs_whose_time_is_up_are_sent_again(whole, machine):
    def jobs():
        return [int(job) for job in (machine / "jobs").read_text().split()]

    ended = []

    def watch(progress):
        if progress.fresh >= 4 and not ended:
            ended.extend(jobs())
            for job in ended:
                os.killpg(job, signal.SIGKILL)

    with esl.study.executors.slurm(2) as executor:
        esl.study.run_study(
            esl.study.Study.from_dict(tomllib.loads(LONG)),
            machine / "study.zarr",
            executor=executor,
            task_size=1,
            watch=watch,
        )
    assert len(ended) == 2
    assert len(jobs()) == 4
    same(machine / "study.zarr", whole)


@LEFT
def test_what_slurm_rejects_is_reported_in_its_words(machine):
    put(
        machine / "sbatch",
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: day' >&2\nexit 1\n",
    )
    with (
        pytest.raises(
            esl.InputError,
            match="that sbatch takes, but sbatch: error: invalid partition specified: day",
        ),
        esl.study.executors.slurm(2),
    ):
        pass


def test_ctrl_c_while_it_waits_for_jobs(tmp_path, monkeypatch, capsys):
    def waiting(jobs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(esl.study.executors, "slurm", waiting)
    (tmp_path / "study.toml").write_text(SMALL)
    assert cli.main(["study", "run", "study.toml", "--slurm", "1"]) == 130
    assert capsys.readouterr().err.startswith(
        "esljax: interrupted; nothing was begun in study.zarr"
    )


@LEFT
def test_jobs_that_do_not_come_are_reported(machine, monkeypatch):
    monkeypatch.setattr(esl.study.executors, "_PATIENCE", 0.1)
    put(machine / "sbatch", "#!/bin/sh\necho Submitted batch job 7\n")
    with (
        pytest.warns(UserWarning, match="No job of SLURM has brought a worker yet"),
        esl.study.executors.slurm(1),
    ):
        pass


def test_a_task_travels_as_plain_data():
    """A worker is sent a few hundred bytes a run, and no array."""
    import pickle

    task = runs.Task((esl.RunConfig(),) * 32, 32, 1)
    assert len(pickle.dumps(task)) < 32 * 500
    assert pickle.loads(pickle.dumps(task)) == task
