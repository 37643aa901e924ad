"""Long files first: the order of a run, by the seconds that its tests took in the last one."""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest

# Seconds of one test, with its share of what the file prepares, where no run has measured it. Only
# the long files matter.
TYPICAL = {
    "01_quickstart": 40.0,
    "02_study": 40.0,
    "03_experiments": 40.0,
    "test_bfloat16": 10.0,
    "test_cli": 3.0,
    "test_diagnosis": 3.0,
    "test_fields": 2.5,
    "test_lowering": 2.0,
    "test_optimize_cli": 10.0,
    "test_readme": 20.0,
    "test_scores": 2.5,
    "test_scripts": 10.0,
    "test_sharding": 3.0,
    "test_study_commands": 4.0,
    "test_velocity": 2.0,
}
OTHERS = 0.7
# Files in the summary.
SHOWN = 10


def longest_first(items: list[pytest.Item], seconds: Mapping[str, float]) -> list[pytest.Item]:
    """Return the tests ordered by how long their files take; a file keeps its own order."""
    total: dict[Path, float] = defaultdict(float)
    for item in items:
        total[item.path] += seconds.get(item.nodeid, TYPICAL.get(item.path.stem, OTHERS))
    return sorted(items, key=lambda item: (-total[item.path], item.path))


class Recorder:
    """The part of pytest's main process: read the seconds, send them to workers, write new ones."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            self.known = json.loads(path.read_text(encoding="utf-8"))
        self.measured: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node) -> None:
        """Send the same seconds to all workers, which must agree on the order."""
        node.workerinput["seconds"] = self.known

    def pytest_runtest_logreport(self, report) -> None:
        """Add a phase of a test."""
        self.measured[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Replace the file by one that holds this run too."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self.known | self.measured, indent=0), encoding="utf-8")
            part.replace(self.path)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Print the files that took longest."""
        total: dict[str, float] = defaultdict(float)
        for test, seconds in self.measured.items():
            total[test.partition("::")[0]] += seconds
        slowest = sorted(total.items(), key=lambda item: -item[1])[:SHOWN]
        if len(slowest) > 1:
            terminalreporter.section(f"slowest {len(slowest)} of {len(total)} files")
            for file, seconds in slowest:
                terminalreporter.write_line(f"{seconds:7.1f}s {file}")
