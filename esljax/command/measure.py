"""`esljax measure`: hold a recorded training run against the speed limit.

A `Measurement` reads and computes; `measure_command` prints and writes its numbers.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from esljax._checks import InputError, memory_of_the_machine, refuse
from esljax._types import Array
from esljax.command.progress import MeasureBar
from esljax.command.results import Results
from esljax.command.settings import DONE, FAILED, NOT_WRITTEN, MeasureConfig
from esljax.experiment import PROJECTIONS, enable, read_toml
from esljax.files import Stored, Terminated, described, open_stored, read, read_matrix
from esljax.measures import (
    Bracket,
    SpeedLimit,
    compared,
    jackknife_groups,
    speed_limit,
    w2_bracket,
)
from esljax.potentials.symmetry import Symmetry, permutations
from esljax.sharding import map_pairs
from esljax.simulation import Trajectory, from_checkpoints, from_snapshots
from esljax.transport import (
    AbstractTransport,
    ProjectedTransport,
    QuotientTransport,
    check_coordinates,
    check_room,
    solution_of,
)
from esljax.velocity import AbstractVelocity

# Fewer snapshots than this for each member are no sign that members come first.
_FAR_LARGER = 4

# The command


def measure_command(config: MeasureConfig) -> int:
    """Run the command and return its exit code."""
    started = time.perf_counter()
    config.check()
    enable(config.dtype)
    console = rich.console.Console(quiet=config.quiet)
    results = Results(config.out, config.as_dict(), (_FIGURE,), force=config.force)
    with results.claimed():
        bar = MeasureBar(console)
        with bar:
            measurement = _read(config, bar)
            if not config.quiet:
                _announce(measurement, console)
            report = measurement.report(bar.solved)
            bracket = measurement.bracket(report)
            content = {**_numbers(report), **measurement.settings(), **_sides(bracket)}
        wall = time.perf_counter() - started

        def figure() -> Any:
            from esljax.figures import plot_speed_limit

            return plot_speed_limit({"this run": report})

        results.write({**content, "wall_seconds": wall}, {_FIGURE: figure})
        _print(console, _summary(content))
        for note in _notes(content):
            _print(console, note)
        _print(console, str(report))
        if bracket is not None:
            _print(console, str(bracket))
        if content["by_key"] is not None:
            _print(console, str(report.by_key()))
        for finding in report.diagnose():
            _print(console, f"- {finding}")
        _print(console, f"{wall:.0f} s; {results.places()}")
        results.say()
    if results.failed:
        return NOT_WRITTEN
    return DONE if _is_trusted(report) else FAILED


def _read(config: MeasureConfig, bar: MeasureBar) -> "Measurement":
    try:
        return Measurement.of(config, bar.read)
    except (KeyboardInterrupt, Terminated):
        if (config.out / _SUMS).exists():
            words = f"the same command goes on from {config.out / _SUMS}."
            print(f"esljax: {words}", file=sys.stderr)
        raise


_FIGURE = "speed_limit.png"


def _print(console: rich.console.Console, line: str) -> None:
    # The terminal breaks the lines, so that copied or piped text has no line ends but its own.
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _announce(measurement: "Measurement", console: rich.console.Console) -> None:
    """Print the number of transport problems, and then the time that they will take."""
    whole, halved = measurement.problems()
    members = measurement.path.positions.shape[1]
    halves = f" and {halved} of up to {members // 2}" if halved else ""
    _print(console, f"{whole} transport problems of up to {members} members{halves}.")
    each, half = measurement.seconds()
    estimate = whole * each + halved * half
    long = f"{estimate / 60:.1f} minutes" if estimate > 90 else f"{estimate:.1f} seconds"
    took = f"{each:.2g} s each" + (f" and {half:.2g} s for the smaller ones" if halved else "")
    _print(console, f"A batch of them took {took}: about {long} in all, and some to compile.")


def _summary(content: dict[str, Any]) -> str:
    """Return a sentence on the run and its coordinates."""
    counted = "{snapshots} snapshots of {members} members".format_map(content)
    kind = "features" if content["measured"] == "features" else "parameters"
    parts = [f"{counted}, {content['coordinates']} {kind} each"]
    if content["folded"] is not None:
        parts.append(f"read in blocks and folded into {content['folded']} coordinates")
    projection = content["projection"]
    if projection["name"] != "none":
        share = projection.get("variance_share")
        variance = "" if share is None else f", which keep {share:.1%} of their variance"
        coordinates = f"{projection['coordinates']} coordinates{variance}"
        parts.append(f"projected ({projection['name']}) on {coordinates}")
    times = content["times"]
    if times is not None and times != {"first": 0.0, "last": 1.0}:
        parts.append("times {first:.12g} to {last:.12g} rescaled to [0, 1]".format_map(times))
    return "; ".join(parts) + "."


def _notes(content: dict[str, Any]) -> list[str]:
    """Return the sentences on how the recording was read, where another reading was possible."""
    notes = []
    if content["left_out"]:
        notes.append(f"Left out of the recording: {described(content['left_out'])}.")
    snapshots, members = content["snapshots"], content["members"]
    if content["times"] is None and snapshots >= _FAR_LARGER * members:
        notes.append(
            f"No times are stored, so the first axis ({snapshots}) was read as snapshots and the "
            f"second ({members}) as members; if members come first, store them second."
        )
    return notes


def _is_trusted(report: SpeedLimit) -> bool:
    # A gap below 0 by less than its errors is no violation; one below 0 without errors is.
    doubtful = not report.holds and report.standard_error is None
    names = {finding.name for finding in report.diagnose()}
    return not doubtful and not _DISTRUSTED & names


_DISTRUSTED = {
    "transport did not converge",
    "bound violated",
    "overflow",
    "underflow",
    "ε hides the motion",
    "rounded positions without motion",
}


# The computation


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A recorded run and the way it is measured. Computes in jax's present floating type."""

    config: MeasureConfig
    path: Trajectory
    """The run, its times rescaled to [0, 1]."""
    times: tuple[float, float] | None
    """The first and the last time as recorded, if any were."""
    left_out: Mapping[str, str]
    """Arrays of the recording that are not measured, and why."""
    transport: AbstractTransport
    """The transport in the coordinates of the projection."""
    symmetry: Symmetry | None
    """The symmetry modulo which the transport compares."""
    matrix: Array | None
    """The projection, shape (d, p)."""
    velocity: AbstractVelocity | None
    debias: bool

    @classmethod
    def of(
        cls, config: MeasureConfig, progress: Callable[[int, int], None] | None = None
    ) -> "Measurement":
        """Read the recording and the projection of `config`.

        **Args:** `progress`: called with the bytes read so far and those in all, where they are
        read in blocks.
        **Raises:** `InputError` for a recording or projection that cannot be read, has wrong shapes
        or is not finite.
        """
        config.check()
        projection_key, sliced_key = jax.random.split(jax.random.key(config.seed))
        stored = _to_stream(config)
        if stored is not None:
            path, times, left_out = _streamed(config, stored, projection_key, progress)
        else:
            path, times, left_out = _loaded(config)
        inner = config.make_transport(sliced_key)
        symmetry = None if config.symmetry is None else _read_symmetry(config.symmetry, path)
        if symmetry is not None:
            inner = QuotientTransport(inner, symmetry)
        matrix = _projection(config, path, projection_key)
        coordinates = path.positions.shape[2] if matrix is None else matrix.shape[1]
        check_room(inner, path.positions.shape[1], coordinates, path.positions.dtype)
        return cls(
            config=config,
            path=path,
            times=None if times is None else (float(times[0]), float(times[-1])),
            left_out=left_out,
            transport=inner if matrix is None else ProjectedTransport(inner, matrix),
            symmetry=symmetry,
            matrix=matrix,
            velocity=config.make_velocity(inner),
            # Halves of fewer than four members know nothing of a bias.
            debias=config.debias and path.positions.shape[1] >= 8,
        )

    def report(self, progress: Callable[[int, int], None] | None = None) -> SpeedLimit:
        """Hold the run against the speed limit.

        **Args:** `progress`: as of `speed_limit`.
        """
        return speed_limit(
            self.path,
            transport=self.transport,
            velocity=self.velocity,
            jackknife=self.config.jackknife,
            debias=self.debias,
            progress=progress,
        )

    def bracket(self, report: SpeedLimit) -> Bracket | None:
        """Return both sides of the W2² between the laws, if they are told apart from the paths:
        modulo a symmetry and without sampling bias."""
        if self.symmetry is None or report.debiased_w2_squared is None:
            return None
        return w2_bracket(self.path, report)

    def problems(self) -> tuple[int, int]:
        """Return how many transport problems there are of up to n members, and of up to n/2."""
        snapshots, members, _ = self.path.positions.shape
        return transport_problems(
            snapshots,
            members,
            maps=self.velocity is not None,
            jackknife=self.config.jackknife,
            halves=self.halves,
        )

    @property
    def halves(self) -> bool:
        """Whether the bias of sampling is removed by halves of the members."""
        return self.debias and not self.transport.moments_only

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of a problem of n members and of n/2, the latter 0 if there is none.

        Timed on batches as the chain solves them: some problems are much harder than others, and a
        batch waits for its hardest.
        """
        positions = self.path.positions
        pairs, coarse = compared(positions.shape[0] - 1)
        each = _seconds(self.transport, positions, positions, pairs + coarse)
        if not self.halves:
            return each, 0.0
        even = positions[:, 0 : positions.shape[1] // 2 * 2 : 2]
        return each, _seconds(self.transport, even, positions[:, 1::2], pairs)

    def settings(self) -> dict[str, Any]:
        """Return what was measured, and how, for report.json."""
        snapshots, members, d = self.path.positions.shape
        first_and_last = None if self.times is None else dict(zip(_ENDS, self.times, strict=True))
        return {
            "snapshots": snapshots,
            "members": members,
            "coordinates": _numbers_of_a_member(self.path),
            "folded": None if self.path.folded is None else d,
            "measured": "features" if self.path.observed else "positions",
            "times": first_and_last,
            "left_out": dict(self.left_out),
            "transport": _transport_settings(self.config),
            "symmetry": _in_report(self.symmetry),
            "projection": _projection_settings(self.config, self.path, self.matrix),
            "velocity": self.config.velocity,
        }


def _numbers_of_a_member(path: Trajectory) -> int:
    return path.positions.shape[2] if path.folded is None else path.folded.coordinates


def transport_problems(
    snapshots: int, members: int, *, maps: bool, jackknife: int, halves: bool
) -> tuple[int, int]:
    """Return how many transport problems `speed_limit` solves for one recorded run.

    **Args:** `maps`: whether there are velocities, by a map to each neighbor in time. `halves`:
    whether distances are debiased by halves of the members.
    **Returns:** how many of up to n members, and how many of up to n/2.
    """
    pairs, coarse = compared(snapshots - 1)
    groups = jackknife_groups(members, jackknife, unit=1 + halves, least=2 + 2 * halves)
    reports = 1 if groups is None else 1 + groups.count + (groups.covered < members)
    whole = reports * len(pairs + coarse) + 2 * snapshots * maps
    return whole, reports * (2 * len(pairs) + snapshots) * halves


def _seconds(transport: AbstractTransport, x: Any, y: Any, pairs: list[tuple[int, int]]) -> float:
    """Return the seconds for each problem of a batch between these snapshots, once compiled."""
    first, second = np.array(pairs).T
    snapshots = jnp.concatenate([x, y])

    def squared(transport, x, y):
        return solution_of(transport, x, y).squared

    @eqx.filter_jit
    def solve(transport, snapshots):
        return map_pairs(
            squared, transport, snapshots, first, len(x) + second, None, in_turn=transport.in_turn
        )

    jax.block_until_ready(solve(transport, snapshots))
    started = time.perf_counter()
    jax.block_until_ready(solve(transport, snapshots))
    return (time.perf_counter() - started) / len(pairs)


def _in_report(symmetry: Symmetry | None) -> dict[str, Any] | None:
    return symmetry and {"exact": symmetry.exact, "groups": str(symmetry)}


def _read_symmetry(file: Path, path: Trajectory) -> Symmetry:
    """The symmetry of a TOML file, as `Symmetry.to_toml` writes it, of the parameters of a run."""
    content = read_toml(file, "symmetry")
    if set(content) - {"permutations", "signs", "sizes"} or "permutations" not in content:
        must = "hold a table `permutations`, and perhaps a list `signs` and a table `sizes`"
        raise refuse("symmetry", must, f"{file} holds {', '.join(content) or 'nothing'}")
    if path.keys is None:
        must = "be of a run whose parameters have names (a folder of checkpoints)"
        raise refuse("symmetry", must, "is given for one whose parameters have none")
    signs, sizes = content.get("signs", ()), content.get("sizes")
    try:
        return permutations(content["permutations"], signs=signs, sizes=sizes, keys=path.keys)
    except InputError as error:
        raise refuse("symmetry", "be one of this run", f"{file} is not: {error}"[:-1]) from error


# Reading

# Beyond this share of the memory a recording is read in blocks: measuring holds it several times.
_SHARE = 0.25
# Coordinates of a fold by parameters, in bytes, and the operations that place them.
_FOLD_BYTES, _FOLD_OPERATIONS = 2.5e8, 1e12
# Where sums are kept while a recording is read in blocks.
_SUMS = "sums.part"


def _loaded(config: MeasureConfig) -> tuple[Trajectory, Any, Mapping[str, str]]:
    """Read a recording into memory."""
    recording = read(config.recording or "", only=config.only, skip=config.skip, name=config.name)
    positions, times = recording.positions, recording.times
    if jnp.issubdtype(positions.dtype, np.floating):
        # Never down: what all positions have in common is subtracted in their own type.
        wide = np.promote_types(positions.dtype, jnp.result_type(float))
        positions = positions.astype(wide, copy=False)
    path = from_snapshots(positions, times, observed=recording.observed, keys=recording.keys)
    return path, times, recording.left_out


def _streamed(
    config: MeasureConfig,
    stored: Stored,
    key: Any,
    progress: Callable[[int, int], None] | None,
) -> tuple[Trajectory, Any, Mapping[str, str]]:
    """Read a recording in blocks. It is folded by its parameters if that is little work."""
    snapshots, members, d = stored.shape
    all_pairs = config.project == "pca"
    if all_pairs:
        check_coordinates(config.coordinates, d, snapshots * members)
    directions = config.coordinates if config.project == "random" else 0
    coordinates = members * (snapshots if all_pairs else 4) + directions
    of_keys = sum(min(size, coordinates) for size in stored.sizes.values())
    many = sum(size > coordinates for size in stored.sizes.values())
    operations = many * (1 if all_pairs else snapshots) * 50.0 * coordinates**3
    held = 8.0 * of_keys * snapshots * members
    path = from_checkpoints(
        config.recording or "",
        only=config.only,
        skip=config.skip,
        name=config.name,
        by_key=held < _FOLD_BYTES and operations < _FOLD_OPERATIONS,
        all_pairs=all_pairs,
        coordinates=directions,
        key=key if directions else None,
        sums=config.out / _SUMS,
        progress=progress,
    )
    return path, stored.times, stored.left_out


def _to_stream(config: MeasureConfig) -> Stored | None:
    """The recording as it lies on disk, if it is read in blocks."""
    if config.stream == "no" or (config.stream == "auto" and config.needs_members() is not None):
        return None
    where = config.recording or ""
    stored = open_stored(where, only=config.only, skip=config.skip, name=config.name)
    # Of the numbers as memory holds them: files may be compressed, linked, or no parameters.
    large = stored.nbytes > _SHARE * memory_of_the_machine()
    return stored if large or config.stream == "yes" else None


def _projection(config: MeasureConfig, path: Trajectory, key: Any) -> Array | None:
    if path.folded is not None and path.folded.directions is not None:
        return path.folded.directions
    if config.project in PROJECTIONS:
        return PROJECTIONS[config.project](path.positions, config.coordinates, key)
    d = path.positions.shape[2]
    matrix = read_matrix(config.project)
    if matrix.shape[0] != d or matrix.shape[1] > d:
        raise refuse(
            "project",
            f"hold a matrix ({d}, p), p ≤ {d}, with a row for each number",
            f"that of {config.project} has shape {matrix.shape}",
        )
    return jnp.asarray(matrix, jnp.result_type(float))


# The numbers of report.json

_ENDS = ("first", "last")
_NUMBERS = (
    "entropy_production",
    "length_squared",
    "w2_squared",
    "gap",
    "temporal",
    "geometric",
    "housekeeping",
    "metric_action",
    "efficiency",
    "certificate",
    "debiased_entropy_production",
    "debiased_length_squared",
    "debiased_w2_squared",
    "debiased_gap",
    "entropy_production_bound",
    "entropy_production_coarse",
    "entropy_production_chain",
    "identity_fraction",
    "learning_time",
    "dissipation",
    "noise_floor",
)
_INTERVALS = ("entropy_production", "w2_squared", "gap", "length_squared", "temporal", "geometric")


def _numbers(report: SpeedLimit) -> dict[str, Any]:
    """Return the numbers of a report as they go into report.json; null is "not resolved"."""
    errors = report.standard_error
    numbers = {name: getattr(report, name) for name in _NUMBERS}
    error_of = {} if errors is None else {name: errors.get(name) for name in _NUMBERS}
    intervals = {} if errors is None else {name: report.interval(name) for name in _INTERVALS}
    resolved = report.length_resolved
    return {
        **{name: None if value is None else float(value) for name, value in numbers.items()},
        "length_resolved": None if resolved is None else bool(resolved),
        "circulation": report.circulation,
        "transport_converged": bool(report.converged),
        "is_bound": report.is_bound,
        "units": "squared coordinates",
        "standard_error": None
        if errors is None
        else {name: float(error) for name, error in error_of.items() if error is not None},
        "intervals": {
            name: [float(interval.lower), float(interval.upper)]
            for name, interval in intervals.items()
        },
        "gap_interval": [float(intervals["gap"].lower), float(intervals["gap"].upper)]
        if intervals
        else None,
        "errors": report.errors,
        "source": report.source,
        "verdict": report.verdict(),
        "findings": [dataclasses.asdict(finding) for finding in report.diagnose()],
        "by_key": _by_key(report),
        "speed": {
            "times": np.asarray(report.times).tolist(),
            "values": np.asarray(report.speed).tolist(),
        },
    }


def _sides(bracket: Bracket | None) -> dict[str, Any]:
    if bracket is None:
        return {}
    error = bracket.lower_error
    sides = {
        "lower": float(bracket.lower),
        "lower_error": None if error is None else float(error),
        "upper": float(bracket.upper),
        "upper_error": float(bracket.upper_error),
    }
    return {"w2_squared_between_laws": sides}


def _by_key(report: SpeedLimit) -> list[dict[str, Any]] | None:
    if report.evidence is None or report.evidence.keys is None:
        return None
    return [share._asdict() for share in report.by_key()]


def _transport_settings(config: MeasureConfig) -> dict[str, Any]:
    more = {"sliced": {"directions": config.directions}, "sinkhorn": {"epsilon": config.epsilon}}
    return {"name": config.transport, **more.get(config.transport, {})}


def _projection_settings(
    config: MeasureConfig, path: Trajectory, matrix: Array | None
) -> dict[str, Any]:
    if matrix is None:
        return {"name": "none", "coordinates": _numbers_of_a_member(path)}
    settings = {"name": config.project, "coordinates": matrix.shape[1]}
    if config.project in PROJECTIONS:
        pooled = np.asarray(path.positions, np.float64).reshape(-1, path.positions.shape[2])
        pooled = pooled - pooled.mean(axis=0)
        # A fold of near snapshots does not keep where all of them lie.
        spread = None if path.folded is None else path.folded.spread
        whole = np.sum(pooled**2) if spread is None else float(spread)
        settings["variance_share"] = (
            float(np.sum((pooled @ np.asarray(matrix, np.float64)) ** 2) / whole) if whole else 1.0
        )
    return settings
