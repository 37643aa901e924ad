"""What a result leaves in a folder: a report, figures, and a JSON file for each schedule."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esljax.files import storage, writing
from esljax.schedules import AbstractSchedule

SCHEDULES = "schedules"


class Leaves(NamedTuple):
    """The files of a result, before they are written."""

    report: str
    """The name of the report."""
    numbers: Mapping[str, Any]
    """What the report holds, beside the settings and the versions."""
    figures: Mapping[str, Callable[[], Any]]
    """What draws each figure, by the name of its file."""
    schedules: Mapping[str, AbstractSchedule]
    """Schedules, by their places in the folder."""


def leaves(
    report: str,
    numbers: Mapping[str, Any],
    figures: Mapping[str, Callable[[], Any]],
    schedules: Mapping[str, AbstractSchedule],
) -> Leaves:
    """The files of a result whose schedules have names."""
    places = {place_of(name): schedule for name, schedule in schedules.items()}
    return Leaves(report, numbers, figures, places)


def place_of(name: str) -> str:
    """Where the schedule of that name goes."""
    return f"{SCHEDULES}/{name}.json"


def save(result: Leaves, folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Write all files of a result.

    **Args:** `settings`: of the result, which the report holds.
    **Raises:** `InputError` for a folder that cannot be written, and where a file would replace one
    that this package did not write.
    """
    # Imported here: matplotlib takes long to load, and does not start everywhere.
    from esljax.figures import rendered

    folder = Path(folder)
    with writing.prepared(folder / SCHEDULES, "folder"):
        names = (result.report, *result.figures)
        writing.claim([folder / name for name in names], {}, force=True)
    content = {**result.numbers, "config": settings, "versions": storage.versions()}
    writing.write_json(folder / result.report, content, "folder")
    for name, schedule in result.schedules.items():
        schedule.save(folder / name)
    for name, draw in result.figures.items():
        drawn = rendered(draw, Path(name).suffix.removeprefix("."), writing.signature({}))[0]
        writing.replace(folder / name, drawn, argument="folder")
