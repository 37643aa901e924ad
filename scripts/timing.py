"""What the scripts here share: fair measurements (compile first, block, interleave, last .1 s, take
medians), arguments, processes and files."""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

LEAST = 0.1


def seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of one call, repeated until `LEAST` seconds have passed."""
    start, repeats = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < LEAST or not repeats:
        jax.block_until_ready(call())
        repeats += 1
    return elapsed / repeats


def medians(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return medians over rounds in which all contenders take turns.

    So a disturbance of the machine falls on all alike.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    measured = [{name: seconds(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in measured) for name in calls}


def in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], processes: int
) -> Iterator[Any]:
    """The function of each item, in order; side by side in new processes if there are several."""
    if processes < 2:
        yield from map(function, items)
        return
    # A forked copy of a process that runs jax may wait forever.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(function, items)


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--smoke", action="store_true", help="the smallest sizes, one round: to see that it runs"
    )
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    return parser


def write(out: Path | None, numbers: Any) -> None:
    """Write the numbers, and the machine and versions that gave them."""
    if out is not None:
        device = jax.devices()[0]
        about = {
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": device.device_kind,
            "cores": os.cpu_count(),
        }
        out.write_text(
            json.dumps({"about": about, **numbers}, indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
