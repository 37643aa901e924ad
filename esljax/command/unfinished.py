"""Runs of a command that are not finished: their checkpoints, and who may go on with them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from esljax._checks import InputError, refuse
from esljax.command.results import SETTINGS, Results
from esljax.command.settings import JobConfig
from esljax.files import is_ours, remove_ours, writing


class Kept:
    """The checkpoints of the stages of a run, in a folder that may hold other files too.

    **Args:** `folder`: that holds the folders of all stages. `stages`: their names.
    """

    def __init__(self, folder: Path, stages: tuple[str, ...]):
        self.folder = folder
        self.stages = [folder / name for name in stages]
        # An empty folder that was there before stays.
        self._was_there = [path for path in (folder, *self.stages) if os.path.lexists(path)]

    @property
    def unfinished(self) -> bool:
        """Whether there is a checkpoint. Half of one has more than a number in its name."""
        return bool(self._numbered())

    def check(self) -> None:
        """**Raises:** `InputError` if something else has the name of a checkpoint."""
        for path in self._numbered():
            empty = path.is_dir() and not any(path.iterdir())
            if not empty and not is_ours(path):
                raise refuse(
                    "out",
                    "be where nothing but results of esljax is replaced",
                    f"{path} is there, which is no checkpoint of esljax (choose another folder)",
                )

    def _numbered(self) -> list[Path]:
        every = (path for stage in self.stages for path in stage.glob("*"))
        return sorted(path for path in every if path.name.isdecimal())

    def words(self) -> str:
        """What becomes of the work so far."""
        if self.unfinished:
            return f"what is saved in {self.folder} is finished by --resume."
        return "nothing was saved yet, and no report was written."

    def remove(self, *, of_this_run: bool = False) -> None:
        """Remove the checkpoints, and the folders that are then empty.

        **Args:** `of_this_run`: leave the folders that were there before this process began.
        """
        for stage in self.stages:
            remove_ours(stage)
        with contextlib.suppress(OSError):
            if self.folder not in self._was_there or not of_this_run:
                self.folder.rmdir()


@contextlib.contextmanager
def unfinished_run(config: JobConfig, kept: Kept, results: Results, first: bool) -> Iterator[None]:
    """Protect an unfinished run in `kept`; record a new one, and drop it again if it is rejected.

    **Args:** `first`: whether this process writes.
    **Raises:** `InputError` if there is an unfinished run, no --resume and no --force.
    """
    kept.check()
    if kept.unfinished and config.force and not config.resume and first:
        kept.remove()
    if kept.unfinished and not config.resume:
        raise refuse(
            "out",
            "be a folder without an unfinished run, or be given with --resume to finish it",
            f"{config.out} holds one",
        )
    ours = first and not kept.unfinished
    settings = config.out / SETTINGS
    before = settings.read_bytes() if ours and settings.exists() else None
    if ours:
        try:
            writing.write_toml(settings, results.settings)
        except OSError as error:
            raise refuse(
                "out", "be a folder that can be written", f"{settings} gives: {error.strerror}"
            ) from error
    try:
        yield
    except InputError:
        # A run that is rejected need not be finished; what an earlier run has left stays.
        if ours:
            kept.remove(of_this_run=True)
            if before is None:
                settings.unlink(missing_ok=True)
            else:
                writing.replace(settings, before)
        raise
