"""Runs that survive: a loop saves its state whole or not at all, and resumes where it stopped.

After each round a loop on the host offers its state (`Session.offer`). The state is written when
enough time has passed, when the process receives SIGTERM, and at the end. Orbax renames a folder
when it is complete, so a half-written folder is never taken for a checkpoint.

A checkpoint is resumed only by an identical run. Beside the state lies a description of the run,
made of its arguments and of the versions that numbers depend on. Any other settings, arrays,
functions or versions are rejected with a message that names the difference, because resuming them
would silently produce a different run.
"""

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from esljax._checks import InputError, check_nonnegative, first_sentence, is_key, refuse
from esljax.files import storage
from esljax.files.description import describe
from esljax.files.orbax import quietly
from esljax.files.processes import watch_processes
from esljax.files.signals import Terminated, endings, handling, uninterrupted
from esljax.files.storage import make_folder, versions

_FORMAT = "format of descriptions"
# 2: functions and classes of esljax are named by their room. Before (without a format): by their
# file, so that the digests of what refers to one may differ for the very same run.
_FORMAT_NOW = "2"


# Orbax checks its files less than its numbers deserve: a bit flipped in a compressed array may come
# back as another number.
_SUMS = "sums of the state"


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run is saved, how often, and whether to resume the run saved there.

    **Args:**
    - `folder`: a folder for this run alone, made if it does not exist. If several processes share
      the run, all of them must see it.
    - `resume`: continue from the latest checkpoint in `folder`; a folder without one starts the
      run, so that one command serves every start. If False, a folder that holds a run is rejected.
    - `every`: the least number of seconds between two checkpoints; 0 saves after each round.

    **Raises:** `InputError` if `every` is negative, or if `folder` is a file or a bucket's address.

    **Example:**

        >>> import tempfile
        >>> import jax
        >>> import esljax as esl
        >>> start, key = jax.random.normal(jax.random.key(0), (4, 2)), jax.random.key(1)
        >>> def run(folder):
        ...     checkpoints = esl.Checkpoints(folder, resume=True)
        ...     return esl.simulate(esl.Quadratic(1.0), esl.Langevin(0.1), start,
        ...                         steps=20, key=key, checkpoints=checkpoints)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first, again = run(folder), run(folder)  # the second call only reads the run
        >>> bool((first.final == again.final).all())
        True
    """

    folder: str | Path
    resume: bool = False
    every: float | int = 60.0

    def __post_init__(self):
        check_nonnegative("every", self.every)
        if not isinstance(self.folder, str | Path):
            raise refuse("folder", "be the path of a folder", f"is {self.folder!r}")
        if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(self.folder)):
            raise refuse(
                "folder",
                "be a folder of a mounted file system",
                f"is the address {self.folder}: mount the bucket, or choose a local folder",
            )
        if Path(self.folder).exists() and not Path(self.folder).is_dir():
            raise refuse("folder", "be a folder", f"{self.folder} is a file")


@contextlib.contextmanager
def session(checkpoints: Checkpoints | None, run: dict[str, Any]) -> Iterator["Session"]:
    """Open the checkpoints of one run around its loop.

    While the session is open in the main thread (the only thread that signals reach), SIGTERM is
    noted instead of ending the process. The next offer then saves the state and raises
    `Terminated`; if none comes, the session raises it when it closes.

    **Args:**
    - `checkpoints`: where to save; None gives a session that does nothing.
    - `run`: the arguments of the run by name, which together decide every number of it.

    **Yields:** `Session`.
    **Raises:** `InputError` if `checkpoints` is not `Checkpoints`, if the run is traced by `jit`,
    `grad` or `vmap`, if the folder cannot be written, or if another run is writing it.

    **Example:** a loop that adds up numbers.

        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import esljax as esl
        >>> from esljax.files import session
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with session(esl.Checkpoints(folder, resume=True), {"rounds": 5}) as saved:
        ...         done, total = saved.restore(lambda done: jnp.zeros(())) or (0, jnp.zeros(()))
        ...         for i in range(done, 5):
        ...             total = total + i
        ...             saved.offer(i + 1, lambda: total, last=i == 4)
        >>> float(total)
        10.0
    """
    watch_processes()
    if checkpoints is None:
        yield Session(None, None, {})
        return
    if not isinstance(checkpoints, Checkpoints):
        raise refuse("checkpoints", "be Checkpoints(folder)", f"is {checkpoints!r}")
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(run)):
        raise refuse(
            "checkpoints",
            "be left out inside jit, grad and vmap, where there is nothing to save",
            "is given",
        )
    folder = Path(checkpoints.folder).resolve()
    make_folder(folder, "checkpoints")
    about = {name: describe(argument) for name, argument in run.items()}
    about |= {f"version of {name}": versions()[name] for name in ("esljax", "jax", "jaxlib")}
    # Orbax would also count and remove folders that are not ours: the session keeps two itself.
    options = _orbax().CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)
    manage = functools.partial(
        _orbax().CheckpointManager, folder, options=options, item_names=("state", "about")
    )
    with alone(folder, "checkpoints") as record, _quiet(), _opened(manage, folder) as manager:
        _drop_halves(folder, record)
        opened = Session(manager, checkpoints, about, record)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_watched(opened))
            for number in endings():
                stack.enter_context(handling(number, opened.request_end))
            yield opened
        # SIGTERM came after the last offer, or the run was already finished and made no offer.
        if opened.end_requested():
            raise opened.terminated()


class Session:
    """One loop and its checkpoints; without a folder, every method does nothing."""

    def __init__(
        self,
        manager: Any,
        settings: Checkpoints | None,
        about: dict[str, str],
        record: storage.Lock | None = None,
    ):
        self._manager, self._settings, self._about = manager, settings, about
        self._record = record
        self._folder = "" if settings is None else settings.folder
        self._last_save, self._end = time.monotonic(), False
        self._saved_round, self._offered_round = -1, 0

    def restore(self, like: Callable[[int], Any]) -> tuple[int, Any] | None:
        """Read the latest checkpoint that can be read.

        **Args:** `like`: a function of a round, returning a state of the structure, shapes and
        shardings that the state had after that round. Arrays that lay on other devices move.
        **Returns:** the round and the state, or None if there is no checkpoint.
        **Raises:** `InputError` if the folder holds a run that is not to be resumed, another run,
        or no checkpoint that can be read. **Warns:** `RuntimeWarning` for each that cannot.
        """
        if self._manager is None or self._settings is None:
            return None
        rounds = sorted(self._manager.all_steps(), reverse=True)
        if rounds and not self._settings.resume:
            raise refuse(
                "checkpoints",
                "be a folder without a run, or have resume=True to continue the run in it",
                f"{self._folder} holds a run at round {rounds[0]}",
            )
        for done in rounds:
            about = self._read(done, "about", _orbax().JsonRestore())
            if about is None:
                continue
            if not (isinstance(about, dict) and all(isinstance(x, str) for x in about.values())):
                self._skip(done, "its description is damaged")
                continue
            self._compare(about)
            state = self._read_state(done, like(done), about.get(_SUMS))
            if state is not None:
                self._saved_round = done
                return done, state
        if rounds:
            raise refuse(
                "checkpoints",
                "hold at least one checkpoint that can be read",
                f"{self._folder} holds none: delete its contents to start the run again, or choose "
                "another folder if they are of something else",
            )
        return None

    def offer(self, step: int, state: Callable[[], Any], *, last: bool = False) -> None:
        """Save the state if enough time has passed, if it is the last, or after SIGTERM.

        **Args:** `step`: the number of rounds done. `state`: makes the state, a pytree; called only
        if the state is saved. `last`: whether the loop ends here.
        **Raises:** `Terminated` after SIGTERM.
        **Warns:** `RuntimeWarning` if the state cannot be written; the next offer tries again.
        """
        if self._manager is None or self._settings is None:
            return
        self._offered_round = step
        due, end = _any_process(
            time.monotonic() - self._last_save >= self._settings.every, self._end
        )
        if (due or end or last) and step > self._saved_round:
            self._save(step, jax.tree.leaves(eqx.filter(state(), eqx.is_array)))
            self._last_save = time.monotonic()
        if end:
            raise self.terminated(f" after round {step}")

    def request_end(self, *_: Any) -> None:
        """Note that the process should end: the handler of SIGTERM while the session is open."""
        self._end = True

    def end_requested(self) -> bool:
        """Whether any of the processes received SIGTERM."""
        return any(_any_process(self._end))

    def terminated(self, when: str = "") -> Terminated:
        """The exception that ends the process, with how much of the run is saved and where."""
        if self._saved_round >= self._offered_round:
            saved = f"saved in {self._folder} and resumes from there"
        elif self._saved_round >= 0:
            saved = (
                f"saved in {self._folder} up to round {self._saved_round} and resumes from there"
            )
        else:
            saved = f"not saved, because {self._folder} could not be written"
        return Terminated(f"Terminated{when}; the run is {saved}.")

    def last_saved(self) -> str:
        """How much of a run that is cut off is saved and where, in words."""
        # Orbax renames a folder when it is complete, and may be cut off just after that.
        rounds = [int(path.name) for path in Path(self._folder).glob("*") if path.name.isdecimal()]
        if not rounds:
            return f"not saved yet in {self._folder}: start all processes again"
        return (
            f"saved in {self._folder} up to round {max(rounds)}: start all processes again with "
            "resume=True, or --resume"
        )

    def _read(self, done: int, item: str, how: Any) -> Any:
        """One item of a checkpoint, or None, with a warning, if it cannot be read."""
        args = _orbax().Composite(**{item: how})
        try:
            return quietly(lambda: self._manager.restore(done, args=args)[item], _unreadable)
        except _Unreadable as reason:
            self._skip(done, str(reason))
            return None

    def _skip(self, done: int, reason: str) -> None:
        warnings.warn(
            f"The checkpoint of round {done} in {self._folder} cannot be read and is skipped: "
            f"{reason}",
            RuntimeWarning,
            stacklevel=4,
        )

    def _read_state(self, done: int, like: Any, sums: str | None) -> Any:
        arrays, rest = eqx.partition(like, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        abstract = {name: _stored(x) for name, x in _numbered(leaves).items()}
        stored = self._read(done, "state", _orbax().StandardRestore(abstract))
        if stored is None:
            return None
        # Checkpoints of earlier versions have no sums.
        if sums is not None and sums != _sums(stored):
            self._skip(done, "its numbers are not those that were saved")
            return None
        restored = [_as_it_was(stored[_name(i)], x) if x.size else x for i, x in enumerate(leaves)]
        return eqx.combine(structure.unflatten(restored), rest)

    def _compare(self, about: dict[str, str]) -> None:
        for name in [*self._about, *(name for name in about if name not in (_FORMAT, _SUMS))]:
            now, then = self._about.get(name, "absent"), about.get(name, "absent")
            if now != then:
                advice = "use another folder for another run"
                if name.startswith("version of "):
                    advice = "install that version to resume it"
                elif _FORMAT not in about and _is_digest(then):
                    advice = "an earlier esljax saved it, whose digests of the same run may differ"
                raise refuse(
                    "checkpoints",
                    "hold the run that is to be resumed",
                    f"{self._folder} holds a run whose {name} is {then}, not {now} ({advice})",
                )

    def _save(self, step: int, leaves: list[Any]) -> None:
        arrays = {name: x if _placed(x) else np.asarray(x) for name, x in _numbered(leaves).items()}
        items = _orbax().Composite(
            state=_orbax().StandardSave(arrays),
            about=_orbax().JsonSave({**self._about, _FORMAT: _FORMAT_NOW, _SUMS: _sums(arrays)}),
        )
        folder = Path(self._folder).resolve()
        try:
            with uninterrupted():
                self._make_way(folder, step)
                self._manager.save(step, args=items, force=True, custom_metadata=_MARK)
                self._saved_round = step
                ours = sorted(i for i in self._manager.all_steps() if is_ours(folder / str(i)))
                for old in ours[:-2]:
                    self._manager.delete(old)
        except Exception as error:
            # Half a checkpoint would fill a full disk for good.
            _drop_halves(folder, self._record)
            warnings.warn(
                f"The checkpoint of round {step} in {self._folder} cannot be written: "
                f"{first_sentence(error)}",
                RuntimeWarning,
                stacklevel=3,
            )

    def _make_way(self, folder: Path, step: int) -> None:
        """Clear the places of a checkpoint about to be written, and note that it is being written.

        Orbax would replace whatever it finds there.
        """
        halves = list(folder.glob(f"{step}.{_HALF}*"))
        if foreign := [path for path in (folder / str(step), *halves) if _is_foreign(path)]:
            raise OSError(f"{foreign[0]} is in the way, which esljax did not write")
        if step in self._manager.all_steps():
            self._manager.delete(step)  # it could not be read
        if self._record is not None:
            self._record({"saving": step})
            self._record.left = {"saving": step}


def is_ours(path: Path) -> bool:
    """Whether a folder is a checkpoint that a session of this package has written, whole or half.

    Orbax gives the checkpoints of every program the same names. Those of a session say whose they
    are in either of two files, so that one damaged file hides nothing.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    return any(
        mark.encode() in _content(path / file)
        for file, mark in (("_CHECKPOINT_METADATA", next(iter(_MARK))), ("about/metadata", _ABOUT))
    )


def remove_ours(folder: Path) -> None:
    """Remove the checkpoints of a session from its folder, and the folder if it is then empty.

    The caller holds the lock of the run. Everything else in the folder stays.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in list(folder.iterdir()):
        named = path.name.isdecimal() or f".{_HALF}" in path.name
        if named and is_ours(path):
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError, InputError):
        # A lock that a killed process has left goes with its run.
        with storage.locked(folder / ".lock", "folder", elsewhere=False) as record:
            _drop_halves(folder, record)
        folder.rmdir()


_HALF = "orbax-checkpoint-tmp"
_MARK = {"written by a session of esljax": True}
_ABOUT = "version of esljax"


def _is_foreign(path: Path) -> bool:
    return os.path.lexists(path) and not is_ours(path)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError:
        return b""


def _opened(manage: Callable[[], Any], folder: Path) -> Any:
    """Open Orbax's manager, which reads the metadata of all checkpoints in its folder."""
    return quietly(
        manage,
        lambda error: refuse(
            "checkpoints",
            "hold checkpoints that can be read",
            f"{folder} holds a damaged one ({first_sentence(error)}): delete its round to resume "
            "from the one before, or all to start again",
        ),
    )


class _Unreadable(Exception):
    """A checkpoint that cannot be read, and why."""


def _unreadable(error: Exception) -> _Unreadable:
    return _Unreadable(first_sentence(error))


@contextlib.contextmanager
def _watched(opened: Session) -> Iterator[None]:
    """Name the checkpoint of this loop if another process of it is gone."""
    watch = watch_processes()
    if watch is None:
        yield
        return
    watch.saved.append(opened.last_saved)
    try:
        yield
    except InputError:
        raise
    except Exception:
        # Where another process is gone, communication fails in many words before it is missed.
        watch.wait()
        raise
    finally:
        watch.saved.remove(opened.last_saved)


@contextlib.contextmanager
def alone(folder: Path, argument: str) -> Iterator[storage.Lock | None]:
    """Hold a folder, so that no other run writes into it meanwhile.

    If several processes share a run, the first of them holds the folder for all.

    **Yields:** the lock, or None in processes other than the first.
    **Raises:** `InputError`, about `argument`, while another run holds it.
    """
    refusal, lock = None, None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                # A run killed on one host resumes on another, where nobody can delete its lock.
                lock = stack.enter_context(
                    storage.locked(folder / ".lock", argument, elsewhere=False)
                )
            except InputError as error:
                refusal = error
        if any(_any_process(refusal is not None)):
            raise refusal or refuse(
                argument, "have no other writer", f"the first process found one in {folder}"
            )
        yield lock


def _drop_halves(folder: Path, record: storage.Lock | None) -> None:
    """Remove the half-written folders of writers that failed; only the first process does.

    A half is ours if it says so, if the lock says that it was being written, or if it holds no
    file.
    """
    if record is None:
        return
    for half in folder.glob(f"*.{_HALF}*"):
        begun = half.name.partition(".")[0] == str(record.left.get("saving"))
        if half.is_symlink() or not half.is_dir():
            continue
        if begun or is_ours(half) or not any(path.is_file() for path in half.rglob("*")):
            shutil.rmtree(half, ignore_errors=True)
    record.left = {}
    record({})


def _is_digest(description: str) -> bool:
    return re.search(" [0-9a-f]{12}$", description) is not None


def _any_process(*flags: bool) -> list[bool]:
    """Whether any process raises each flag, so that all of them save together or none does."""
    if jax.process_count() == 1:
        return list(flags)
    from jax.experimental.multihost_utils import process_allgather

    return [bool(flag) for flag in np.any(process_allgather(np.asarray(flags)), axis=0)]


def _placed(x: Any) -> bool:
    """Whether an array was put on particular devices.

    Any other array is the same in every process, and is saved as numbers alone.
    """
    return isinstance(x, jax.Array) and x.committed


def _stored(x: Any) -> Any:
    return (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        if _placed(x)
        else np.zeros(x.shape, x.dtype)
    )


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    """The leaves by their places, as Orbax accepts them: no keys, and no empty arrays."""
    return {
        _name(i): jax.random.key_data(x) if is_key(x) else x for i, x in enumerate(leaves) if x.size
    }


def _as_it_was(stored: Any, like: Any) -> Any:
    """A stored array, as the kind of array that was saved."""
    if is_key(like):
        return jax.random.wrap_key_data(
            _as_it_was(stored, jax.random.key_data(like)), impl=jax.random.key_impl(like)
        )
    if isinstance(like, jax.Array):
        # An array that was on no particular device must not come back bound to one.
        return stored if _placed(like) else jnp.asarray(stored)
    return np.asarray(stored)


def _sums(arrays: dict[str, Any]) -> str:
    """A sum of the bits of each array, weighted by their places.

    Integers add up to the same on any number of devices, and a weight that is odd lets no flipped
    bit vanish.
    """
    return " ".join(f"{int(_sum(arrays[name])):08x}" for name in sorted(arrays))


def _sum(x: Any) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return _sum_across(x)
    values = np.ascontiguousarray(x)
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint32}.get(values.dtype.itemsize, np.uint8)
    words = values.reshape(-1).view(kind).astype(np.uint32)
    return np.sum(words * (np.arange(words.size, dtype=np.uint32) * _STEP | 1), dtype=np.uint32)


@jax.jit
def _sum_across(x: Any) -> Any:
    """The same of an array of which other processes hold a part."""
    kind = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}.get(x.dtype.itemsize, jnp.uint8)
    words = x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    words = words.astype(jnp.uint32).ravel()
    weights = jnp.arange(words.size, dtype=jnp.uint32) * _STEP | 1
    return jnp.sum(words * weights, dtype=jnp.uint32)


# An odd number without a pattern (2³² over the golden ratio): neighbors in each other's places
# change the sum.
_STEP = np.uint32(2654435769)


def _name(i: int) -> str:
    return f"{i:04d}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence absl's logger, through which Orbax warns of choices that are made here on purpose."""
    import logging

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.cache
def _orbax() -> types.SimpleNamespace:
    """The used part of Orbax, imported on first use because it takes as long to load as jax."""
    import orbax.checkpoint as ocp

    return types.SimpleNamespace(
        CheckpointManager=ocp.CheckpointManager,
        CheckpointManagerOptions=ocp.CheckpointManagerOptions,
        Composite=ocp.args.Composite,
        JsonRestore=ocp.args.JsonRestore,
        JsonSave=ocp.args.JsonSave,
        StandardRestore=ocp.args.StandardRestore,
        StandardSave=ocp.args.StandardSave,
    )
