"""A recorded training run held against the speed limit as a `MeasureConfig` says, and what there is to tell about it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.markup
import rich.progress
import rich.table

from esljax._checks import refuse
from esljax.command.settings import DONE, FAILED, MeasureConfig
from esljax.experiment import enable
from esljax.figures import plot_speed_limit
from esljax.files import read, read_matrix, storage
from esljax.measures import SpeedLimit, compared, jackknife_groups, speed_limit
from esljax.sharding import map_pairs
from esljax.simulation import Trajectory, from_snapshots
from esljax.transport import (
    AbstractTransport,
    ExactTransport,
    GaussianTransport,
    ProjectedTransport,
    SinkhornTransport,
    principal_directions,
    random_directions,
)
from esljax.velocity import TransportVelocity


def measure_command(config: MeasureConfig) -> int:
    """Run the command and return its exit code."""
    started = time.perf_counter()
    config.check()
    enable(config.dtype)
    console = rich.console.Console(quiet=config.quiet)
    with console.status(f"measuring {rich.markup.escape(str(config.recording))}"):
        tell = (
            None
            if config.quiet
            else lambda said: console.print(said, markup=False, highlight=False, soft_wrap=True)
        )
        report, said, content = measure(config, tell)
        figure = plot_speed_limit({"this run": report})
    wall = time.perf_counter() - started
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        storage.write_toml(config.out / "config.toml", config.as_dict())
        storage.write_json(
            config.out / "report.json",
            {
                **content,
                "config": config.as_dict(),
                "versions": storage.versions(),
                "wall_seconds": wall,
            },
        )
        figure.savefig(config.out / "speed_limit.png", dpi=150)
    except OSError as error:
        raise refuse(
            "out", "be a folder that can be written", f"{config.out} gives: {error.strerror}"
        ) from error
    written = f"{wall:.0f} s; report.json, config.toml and speed_limit.png are in {config.out}/"
    # The terminal breaks the lines, so that what is copied or piped has none but its own.
    findings = report.diagnose()
    found = "".join(f"- {finding}\n" for finding in findings)
    console.print(
        f"{said}\n{report}\n{found}{written}", markup=False, highlight=False, soft_wrap=True
    )
    # A gap below 0 by less than its errors is no violation; one below 0 without errors is.
    doubtful = not report.holds and report.standard_error is None
    return (
        FAILED
        if doubtful
        or {"transport did not converge", "bound violated"} & {finding.name for finding in findings}
        else DONE
    )


class Measurement(NamedTuple):
    """The numbers, what was measured in words, and both as they go into report.json."""

    report: SpeedLimit
    said: str
    content: dict[str, Any]


def measure(config: MeasureConfig, tell: Callable[[str], None] | None = None) -> Measurement:
    """Read the recording of `config` and hold it against the speed limit. Computes in jax's present floating type and writes nothing.

    **Args:** `tell`: where to say beforehand how many transport problems there are, and how long they will take.
    **Raises:** `InputError` for a recording or projection that cannot be read, has wrong shapes or is not finite.
    """
    config.check()
    recording = read(config.recording or "")
    positions = recording.positions
    if jnp.issubdtype(positions.dtype, np.floating):
        positions = positions.astype(jnp.result_type(float))
    path = from_snapshots(positions, recording.times, observed=recording.observed)
    projection_key, sliced_key = jax.random.split(jax.random.key(config.seed))
    inner = config.make_transport(sliced_key)
    matrix = _projection(config, path, projection_key)
    transport = inner if matrix is None else ProjectedTransport(inner, matrix)
    velocity = None
    if config.velocity == "transport" and isinstance(
        inner, ExactTransport | GaussianTransport | SinkhornTransport
    ):
        velocity = TransportVelocity(inner)
    # Halves of fewer than four members know nothing of a bias.
    debias = config.debias and path.positions.shape[1] >= 8
    if tell is not None:
        _foretell(path, transport, velocity is not None, config.jackknife, debias, tell)
    report = speed_limit(
        path, transport=transport, velocity=velocity, jackknife=config.jackknife, debias=debias
    )

    projection = _describe(config, path, matrix)
    times = (
        None
        if recording.times is None
        else {"first": float(recording.times[0]), "last": float(recording.times[-1])}
    )
    content = {
        **_content(report),
        "snapshots": path.positions.shape[0],
        "members": path.positions.shape[1],
        "coordinates": path.positions.shape[2],
        "measured": "features" if path.observed else "positions",
        "times": times,
        "transport": _settings(config),
        "projection": projection,
        "velocity": config.velocity,
    }
    return Measurement(report, _said(content), content)


def transport_problems(
    snapshots: int, members: int, *, maps: bool, jackknife: int, debias: bool
) -> tuple[int, int]:
    """How many transport problems `speed_limit` solves for one recorded run, of up to n members and of up to n/2.

    **Args:** `maps`: whether there are velocities, by a map to each neighbor in time.
    """
    pairs, coarse = compared(snapshots - 1)
    kept = jackknife_groups(members, jackknife, unit=1 + debias, least=2 + 2 * debias)
    reports = 1 if kept is None else 1 + len(kept)
    return reports * len(pairs + coarse) + 2 * snapshots * maps, reports * (
        2 * len(pairs) + snapshots
    ) * debias


def _foretell(
    path: Trajectory,
    transport: AbstractTransport,
    maps: bool,
    jackknife: int,
    debias: bool,
    tell: Callable[[str], None],
) -> None:
    """Say how many problems there are, and then, from the time of a batch of each size, how long they will take."""
    positions, members = path.positions, path.positions.shape[1]
    whole, halved = transport_problems(
        positions.shape[0], members, maps=maps, jackknife=jackknife, debias=debias
    )
    halves = f" and {halved} of up to {members // 2}" if halved else ""
    tell(f"{whole} transport problems of up to {members} members{halves}.")
    # As the chain solves them: some problems are much harder than others, and a batch waits for its hardest.
    pairs, coarse = compared(positions.shape[0] - 1)
    each = _seconds(transport, positions, positions, pairs + coarse)
    half = (
        _seconds(transport, positions[:, 0 : members // 2 * 2 : 2], positions[:, 1::2], pairs)
        if halved
        else 0.0
    )
    estimate = whole * each + halved * half
    long = f"{estimate / 60:.1f} minutes" if estimate > 90 else f"{estimate:.1f} seconds"
    measured = f"{each:.2g} s each" + (f" and {half:.2g} s for the smaller ones" if halved else "")
    tell(f"A batch of them took {measured}: about {long} in all, and some to compile.")


def _seconds(transport: AbstractTransport, x: Any, y: Any, pairs: list[tuple[int, int]]) -> float:
    """Seconds for each problem of a batch between these snapshots, once it is compiled."""
    first, second = np.array(pairs).T
    snapshots, squared = (
        jnp.concatenate([x, y]),
        lambda transport, x, y: transport.solve(x, y).squared,
    )

    @eqx.filter_jit
    def solve(transport, snapshots):
        return map_pairs(
            squared, transport, snapshots, first, len(x) + second, None, in_turn=transport.in_turn
        )

    jax.block_until_ready(solve(transport, snapshots))
    started = time.perf_counter()
    jax.block_until_ready(solve(transport, snapshots))
    return (time.perf_counter() - started) / len(pairs)


def _projection(config: MeasureConfig, path: Trajectory, key: Any) -> Any:
    d = path.positions.shape[2]
    if config.project == "none":
        return None
    if config.project == "pca":
        return principal_directions(path.positions, config.coordinates)
    if config.project == "random":
        return random_directions(d, config.coordinates, key)
    matrix = read_matrix(config.project)
    if matrix.shape[0] != d or matrix.shape[1] > d:
        raise refuse(
            "project",
            f"hold a matrix ({d}, p), p ≤ {d}, with a row for each number",
            f"that of {config.project} has shape {matrix.shape}",
        )
    return jnp.asarray(matrix, jnp.result_type(float))


_NUMBERS = (
    "entropy_production",
    "length_squared",
    "w2_squared",
    "gap",
    "temporal",
    "geometric",
    "housekeeping",
)
_DEBIASED = ("debiased_entropy_production", "debiased_w2_squared", "debiased_gap")
_OPTIONAL = (
    *_DEBIASED,
    "entropy_production_coarse",
    "entropy_production_chain",
    "identity_fraction",
    "learning_time",
    "noise_floor",
)


def _content(report: SpeedLimit) -> dict[str, Any]:
    errors = report.standard_error
    known_errors = (
        {} if errors is None else {name: getattr(errors, name) for name in (*_NUMBERS, *_DEBIASED)}
    )
    interval = (
        report.interval("gap") if errors is not None and errors.gap_lower is not None else None
    )
    optional = {name: getattr(report, name) for name in _OPTIONAL}
    return {
        **{name: float(getattr(report, name)) for name in _NUMBERS},
        "efficiency": float(report.efficiency),
        **{name: None if value is None else float(value) for name, value in optional.items()},
        "transport_converged": bool(report.converged),
        "is_bound": report.is_bound,
        "standard_error": None
        if errors is None
        else {name: float(error) for name, error in known_errors.items() if error is not None},
        "gap_interval": None
        if interval is None
        else [float(interval.lower), float(interval.upper)],
        "errors": report.errors,
        "source": report.source,
        "verdict": report.verdict(),
        "findings": [dataclasses.asdict(finding) for finding in report.diagnose()],
        "speed": {
            "times": np.asarray(report.times).tolist(),
            "values": np.asarray(report.speed).tolist(),
        },
    }


def _settings(config: MeasureConfig) -> dict[str, Any]:
    more = {"sliced": {"directions": config.directions}, "sinkhorn": {"epsilon": config.epsilon}}
    return {"name": config.transport, **more.get(config.transport, {})}


def _describe(config: MeasureConfig, path: Trajectory, matrix: Any) -> dict[str, Any]:
    if matrix is None:
        return {"name": "none", "coordinates": path.positions.shape[2]}
    described = {"name": config.project, "coordinates": matrix.shape[1]}
    if config.project in ("pca", "random"):
        pooled = np.asarray(path.positions, np.float64).reshape(-1, path.positions.shape[2])
        pooled = pooled - pooled.mean(axis=0)
        whole = np.sum(pooled**2)
        described["variance_share"] = (
            float(np.sum((pooled @ np.asarray(matrix, np.float64)) ** 2) / whole) if whole else 1.0
        )
    return described


def _said(content: dict[str, Any]) -> str:
    counted = "{snapshots} snapshots of {members} members".format_map(content)
    kind = "features" if content["measured"] == "features" else "parameters"
    said = [f"{counted}, {content['coordinates']} {kind} each"]
    projection = content["projection"]
    if projection["name"] != "none":
        share = projection.get("variance_share")
        kept = "" if share is None else f", which keep {share:.1%} of their variance"
        said.append(
            f"projected ({projection['name']}) on {projection['coordinates']} coordinates{kept}"
        )
    if content["times"] is not None and content["times"] != {"first": 0.0, "last": 1.0}:
        said.append(
            "times {first:.12g} to {last:.12g} rescaled to [0, 1]".format_map(content["times"])
        )
    return "; ".join(said) + "."
