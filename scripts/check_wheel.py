"""Build the distributions, check them, and run them in an empty environment, as a stranger does.

    python scripts/check_wheel.py [--smoke] [--out FILE.json]

Build an sdist from the checkout and a wheel from the sdist, read both with `twine check`, and
install the wheel into a new virtual environment in a temporary folder. There, in an empty folder,
run the commands: help, references, and the main job. `--smoke` runs the main job in a small size.
Needs the package index, for the build and for the dependencies of the wheel.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing

ROOT = Path(__file__).parents[1]
# Anyone who has the sdist can read, test, build the site and repeat the measurements.
IN_SDIST = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "docs/conf.py",
    "docs/index.md",
    "docs/speed_limit.png",
    "esljax/py.typed",
    "notebooks/01_quickstart.py",
    "scripts/timing.py",
    "tests/conftest.py",
)
SMALL = """
data = "moons"
hidden = [4]
members = 4
steps = 20
snapshots = 5
batch_size = 32
knots = 4
iterations = 15
judge_runs = 2
match_runs = 1
transport = "gaussian"
"""


def run(
    command: Sequence[str | Path], folder: Path, accepted: Sequence[int] = (0,)
) -> dict[str, Any]:
    """Run a command to its end.

    **Returns:** its seconds and the last line that it printed.
    **Raises:** `SystemExit` with all that it printed for an exit code that is not accepted.
    """
    # A folder on PYTHONPATH would hide what is missing from the wheel.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode not in accepted:
        words = " ".join(map(str, command))
        raise SystemExit(f"{done.stdout}\n`{words}` ended with exit code {done.returncode}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return {
        "seconds": time.perf_counter() - began,
        "last_line": last,
    }


def environment(folder: Path, *packages: str | Path) -> Path:
    """Make a virtual environment with these packages and return its folder of programs."""
    venv.create(folder, with_pip=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [programs / "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *map(str, packages)], folder)
    return programs


def missing(sdist: Path, wheel: Path) -> list[str]:
    """Name the files that should be in the distributions and are not."""
    with tarfile.open(sdist) as archive:
        there = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        installed = set(archive.namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "esljax").rglob("*.py")}
    return sorted((set(IN_SDIST) - there) | ((package | {"esljax/py.typed"}) - installed))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = timing.parser(__doc__.splitlines()[0]).parse_args(argv)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools = environment(folder / "tools", "build", "twine")
        # A wheel from the sdist, so that the sdist is enough to build from.
        build = [tools / "python", "-m", "build", "--outdir", folder / "dist", ROOT]
        results["build"] = run(build, folder)
        (sdist,) = (folder / "dist").glob("*.tar.gz")
        (wheel,) = (folder / "dist").glob("*.whl")
        results["twine check"] = run([tools / "twine", "check", "--strict", sdist, wheel], folder)
        absent = missing(sdist, wheel)
        if absent:
            raise SystemExit(f"the distributions lack {', '.join(absent)}")
        began = time.perf_counter()
        programs = environment(folder / "empty", wheel)
        results["install"] = {"seconds": time.perf_counter() - began}
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        size = ["--config", "small.toml"] if args.smoke else []
        (elsewhere / "small.toml").write_text(SMALL)
        for title, command in {
            "esljax --help": ["--help"],
            "esljax check": ["check"],
            "esljax optimize": ["optimize", *size, "--out", "run"],
        }.items():
            # So few members miss the target loss by their spread, which is what exit code 1 means.
            accepted = (0, 1) if command[0] == "optimize" and args.smoke else (0,)
            results[title] = run([programs / "esljax", *command], elsewhere, accepted)
        written = {path.name for path in (elsewhere / "run").iterdir()}
        if not {"report.json", "config.toml", "speed_limit.png"} <= written:
            raise SystemExit(f"the main job wrote only {', '.join(sorted(written))}")
        kilobytes = {path.name: path.stat().st_size / 1000 for path in (sdist, wheel)}
    print(f"Python {sys.version.split()[0]}, {', '.join(kilobytes)}")
    for title, result in results.items():
        print(f"{title:16}  {result['seconds']:6.1f} s  {result.get('last_line', '')}")
    numbers = {"results": results, "kilobytes": kilobytes}
    timing.write(args.out, numbers)
    return numbers


if __name__ == "__main__":
    main()
