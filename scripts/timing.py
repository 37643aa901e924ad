"""Measure for every benchmark here: compile first, block, interleave, last .1 s, take medians."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
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
