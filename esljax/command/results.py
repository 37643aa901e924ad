"""What a command leaves in its folder: settings, a report and figures, whatever fails of it.

The numbers of a run may have cost hours. So the folder is tried before the work, files are written
before anything is printed, and where a file cannot be written or a figure cannot be drawn the rest
still is, and the numbers are printed.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from esljax._checks import InputError
from esljax.files import storage, uninterrupted, writing
from esljax.schedules import AbstractSchedule, is_schedule

SETTINGS, REPORT = "config.toml", "report.json"


class Results:
    """The files of one run of a command in its folder.

    **Args:** `folder`: where they go. `settings`: of the run, as `as_dict` gives them.
    `figures`: the names of its figures. `force`: whether files that esljax wrote for other
    settings are replaced. `report`: the name of the report. `schedules`: the places of those that
    it may save.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        figures: tuple[str, ...],
        *,
        force: bool,
        report: str = REPORT,
        schedules: Sequence[str] = (),
    ):
        self.folder, self.settings, self.figures = folder, settings, figures
        self.report, self.schedules = report, schedules
        self.force = force
        self.troubles: list[str] = []
        self.written: list[str] = []
        self.failed = False
        """Whether a file could not be written; a figure that could not be drawn is no failure."""

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Make the folder, and see that the files can be written, before the work.

        **Raises:** `InputError`, about `out`, if they cannot, or if they would replace what is not
        their own.
        """
        with writing.prepared(self.folder, "out"):
            self.check()
            yield

    def check(self) -> None:
        """**Raises:** `InputError` if the files would replace what is not their own."""
        names = (SETTINGS, self.report, *self.figures)
        writing.claim([self.folder / name for name in names], self.settings, force=self.force)
        places = [self.folder / name for name in self.schedules]
        writing.claim(places, {}, force=True, ours=is_schedule)

    def write(
        self,
        report: Mapping[str, Any],
        figures: Mapping[str, Callable[[], Any]],
        schedules: Mapping[str, AbstractSchedule] | None = None,
    ) -> None:
        """Write the report, the settings, figures and schedules, whichever of the others fail.

        **Args:** `report`: the numbers; the settings and the versions are added. `figures`: what
        draws each figure, by the name of its file. `schedules`: by their places in the folder.
        """
        content = {**report, "config": self.settings, "versions": storage.versions()}
        with uninterrupted():
            self._try(self.report, lambda path: writing.write_json(path, content))
            self._try(SETTINGS, lambda path: writing.write_toml(path, self.settings))
            for name, draw in figures.items():
                self._draw(name, draw)
            for name, schedule in (schedules or {}).items():
                self._try(name, schedule.save)

    def say(self) -> None:
        """Print what could not be done, a line each, on standard error."""
        for trouble in self.troubles:
            print(f"esljax: {trouble}", file=sys.stderr)

    def places(self) -> str:
        """Where the files are, in words."""
        inner = [name for name in self.written if "/" in name]
        folders = {name.rpartition("/")[0] for name in inner}
        shown = [name for name in self.written if name not in inner]
        *names, last = [*shown, *(f"{folder}/" for folder in sorted(folders))] or [""]
        listed = f"{', '.join(names)} and {last}" if names else last
        one = f"{listed} is" if not names else f"{listed} are"
        return f"{one} in {self.folder}/" if last else f"nothing is in {self.folder}/"

    def _draw(self, name: str, draw: Callable[[], Any]) -> None:
        kind = Path(name).suffix.removeprefix(".")
        try:
            # Imported here, because loading matplotlib takes its time and may fail.
            from esljax.figures import rendered

            content, remark = rendered(draw, kind, writing.signature(self.settings))
        except InputError as error:
            self.troubles.append(f"{name} was not drawn: {error}")
            return
        if remark:
            self.troubles.append(f"{name} is {remark}.")
        self._try(name, lambda path: writing.replace(path, content))

    def _try(self, name: str, write: Callable[[Path], None]) -> None:
        try:
            write(self.folder / name)
        except (OSError, InputError) as error:
            reason = getattr(error, "strerror", None) or error
            self.troubles.append(f"{self.folder / name} could not be written: {reason}")
            self.failed = True
        else:
            self.written.append(name)
