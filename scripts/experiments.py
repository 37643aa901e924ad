"""Share among the experiment scripts: arguments, resumable parts, effects with intervals, pages.

A script writes down its analysis first, calls `each` for its runs, and `Page.write` for what the
site shows: FOLDER/NAME.md, tables under a line with the command, and FOLDER/NAME.png.
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
import timing

import esljax as esl
from esljax.study import executors

Table = Sequence[Sequence[str]]


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every experiment; `--out` and `--smoke` are those of `timing.parser`."""
    parser = timing.parser(description)
    parser.add_argument("--folder", type=Path, help="where to write the tables and the figure")
    parser.add_argument("--store", type=Path, help="where finished runs are kept, to resume")
    parser.add_argument("--processes", type=int, default=1, help="how many compute at a time")
    return parser


class Effect(NamedTuple):
    """A mean over keys, with the ends of its 95 % t-interval."""

    mean: float
    low: float
    high: float
    keys: int

    def __str__(self) -> str:
        if np.isnan(self.mean):
            return "none"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"

    @property
    def bar(self) -> float:
        """Half the interval, for an error bar."""
        return (self.high - self.low) / 2


def effect(values: Any, other: Any = None) -> Effect:
    """The mean of one number a key, or of its paired difference from `other`; NaN are not dropped.

    **Args:** `values`, `other`: shape (keys,), in the same order of keys.
    """
    values = np.asarray(values, float) - (0 if other is None else np.asarray(other, float))
    mean, keys = float(values.mean()), len(values)
    if keys < 2:
        return Effect(mean, float("nan"), float("nan"), keys)
    half = scipy.stats.t.ppf(0.975, keys - 1) * values.std(ddof=1) / np.sqrt(keys)
    return Effect(mean, mean - float(half), mean + float(half), keys)


def exponent(x: Any, values: Any) -> Effect:
    """The slope of log `values` (keys, points) in log `x` (points,) or (keys, points), fitted to
    each key apart."""
    logs = np.log(np.asarray(values, float))
    at = np.broadcast_to(np.log(np.asarray(x, float)), logs.shape)
    if logs.shape[1] < 2:
        return effect(np.full(len(logs), np.nan))
    return effect([np.polyfit(*fit, 1)[0] for fit in zip(at, logs, strict=True)])


def column(parts: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One number of the `rows` of every part, shape (parts, rows); NaN where a row has none."""
    return np.array([[row.get(name, np.nan) for row in part["rows"]] for part in parts], float)


def curve(axes: Any, x: Any, values: Any, **style: Any) -> None:
    """Draw means over keys of `values` (keys, points) at `x` (points,), with 95 % intervals."""
    effects = [effect(each) for each in np.asarray(values, float).T]
    bars = [one.bar for one in effects]
    usual = {"marker": "o", "ms": 4, "capsize": 2, "lw": 1.2}
    axes.errorbar(x, [one.mean for one in effects], bars, **{**usual, **style})


def each(
    function: Callable[..., dict[str, Any]],
    tasks: Sequence[Mapping[str, Any]],
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Call `function(**task)` for every task, and return the dictionaries in their order.

    With `--processes` other than 1 tasks go to processes of one thread each, in the order given.
    With `--store` what is finished is kept as JSON, and another call with the same task reads it,
    unless the code behind it has changed. So a function must return what JSON holds; it is defined
    at the top of its script.
    """
    source = _behind(function)
    names = [hashlib.sha256(repr((source, sorted(task.items()))).encode()) for task in tasks]
    with tempfile.TemporaryDirectory() as passing:
        store = arguments.store or Path(passing)
        store.mkdir(parents=True, exist_ok=True)
        files = [store / f"{function.__name__}-{name.hexdigest()[:20]}.json" for name in names]
        left = [i for i, file in enumerate(files) if not file.exists()]
        arguments.found = getattr(arguments, "found", 0) + len(files) - len(left)
        if arguments.processes == 1:
            for i in left:
                _keep(files[i], function(**tasks[i]))
        elif left:
            _side_by_side(function, tasks, files, left, arguments.processes, store)
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def _behind(function: Callable[..., Any]) -> list[str]:
    """The source of a function, and of what it uses in this folder: a part does not depend on the
    tables and figures of its script."""
    here, found, left = Path(__file__).parent, {function.__name__: function}, [function.__code__]
    while left:
        code = left.pop()
        left += [inner for inner in code.co_consts if inspect.iscode(inner)]
        for name in set(code.co_names) & set(function.__globals__) - set(found):
            found[name] = used = function.__globals__[name]
            if inspect.isfunction(used) and used.__module__ == function.__module__:
                left.append(used.__code__)

    def text(used: Any) -> str:
        if not inspect.ismodule(used) and not callable(used):
            return repr(used)
        module = inspect.getmodule(used)
        file = Path(getattr(module, "__file__", None) or "/")
        return (
            inspect.getsource(used) if file.parent == here and file.name != "experiments.py" else ""
        )

    return [name + text(found[name]) for name in sorted(found)]


def _side_by_side(function, tasks, files, left, processes: int, store: Path) -> None:
    threads = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OPENBLAS_NUM_THREADS": "1"}
    # What one process has compiled, the others read.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(store / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    before = dict(os.environ)
    os.environ.update(cache | threads | {name: before[name] for name in cache if name in before})
    try:
        with executors.processes(processes) as pool:
            futures = {pool.submit(function, **tasks[i]): i for i in left}
            for number, future in enumerate(as_completed(futures), 1):
                _keep(files[futures[future]], future.result())
                print(f"{number} of {len(left)}", end="\r", file=sys.stderr, flush=True)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _keep(file: Path, content: dict[str, Any]) -> None:
    """Write a part whole or not at all."""
    whole = file.with_suffix(".part")
    whole.write_text(json.dumps(content), encoding="utf-8")
    whole.replace(file)


class Page:
    """What a script shows. Made at its start, because the wall time is counted from there.

    **Args:** `name`: of the files. `arguments`: those of `parser`. `seed`: of the first key.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, seed: int = 0):
        self.name, self.arguments, self.seed = name, arguments, seed
        self.began = time.perf_counter()

    def about(self) -> list[str]:
        """Command, seed, versions, machine and wall time, in two lines."""
        given = {
            name: value
            for name, value in vars(self.arguments).items()
            # Where files lie changes no number.
            if not isinstance(value, Path) and name != "found" and value not in (None, False)
        }
        flags = (
            f" --{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in given.items()
            if not (name == "processes" and value == 1)
        )
        wall = f"{time.perf_counter() - self.began:.0f} s"
        if found := getattr(self.arguments, "found", 0):
            wall += f" after {found} runs of an earlier call"
        packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "numpy"))
        return [
            f"python scripts/experiment_{self.name}.py{''.join(flags)}",
            f"seed {self.seed}; esljax {esl.__version__}, {packages}, Python "
            f"{platform.python_version()}; {os.cpu_count()} cores, "
            f"{jax.devices()[0].platform}; {wall}",
        ]

    def write(
        self, tables: Mapping[str, Table], figure: Any = None, numbers: Mapping[str, Any] = {}
    ) -> None:
        """Print the tables; write them, the figure and the numbers where the flags say.

        **Args:** `tables`: by title, rows of cells with a heading first. `figure`: of matplotlib,
        as large as the script wants it. `numbers`: for `--out`.
        """
        about = self.about()
        for title, rows in tables.items():
            print(f"\n{title}\n{esl.results.table(rows, 'l' * len(rows[0]))}")
        print("\n" + "\n".join(about))
        folder = self.arguments.folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            lines = [f"`{about[0]}`", f"<br>{about[1]}"]
            for title, rows in tables.items():
                lines += ["", f"**{title}**", "", *_markdown(rows)]
            text = "\n".join(lines) + "\n"
            (folder / f"{self.name}.md").write_text(text, encoding="utf-8")
            if figure is not None:
                figure.text(0.005, -0.01, "\n".join(about), fontsize=5, color="0.4", va="top")
                figure.savefig(folder / f"{self.name}.png", dpi=150, bbox_inches="tight")
        timing.write(
            self.arguments.out, {"command": about[0], "machine": about[1], **dict(numbers)}
        )


def _markdown(rows: Table) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
