"""Runs that survive: what a loop needs to go on, saved whole or not at all, and taken up by nothing but the same run.

A loop on the host says after each of its rounds what it would need to go on (`Session.offer`). That is written when enough time has
passed, when the process is told to end (SIGTERM), and at the end. A folder that is half written is none: Orbax renames it when it is
complete. With the state goes a description of the run, made of its arguments and the versions that numbers depend on; what is taken up
under another description would silently become a different run, so it is refused.
"""

import contextlib
import dataclasses
import functools
import re
import shutil
import signal
import threading
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

from esljax._checks import InputError, check_nonnegative, is_key, refuse
from esljax.files.description import describe
from esljax.files.storage import locked, versions

TERMINATED = 143
"""The exit code of a process that was told to end and has saved its run: 128 and the number of SIGTERM, as shells have it."""


class Terminated(SystemExit):
    """The process was told to end, and the run is saved. Uncaught, it ends the process with exit code 143."""

    def __init__(self, said: str):
        super().__init__(TERMINATED)
        self.said = said

    def __str__(self) -> str:
        return self.said


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a run is saved, how often, and whether to go on with what is there.

    **Args:** `folder`: of this run alone; made if it does not exist. Several processes must all see it. `resume`: go on from the latest
    checkpoint there; a folder without one starts the run, so that one command serves every start. Without it a folder that holds a run is
    refused. `every`: the least number of seconds between two checkpoints; 0 for one after each round.
    **Raises:** `InputError` if `every` is negative, or `folder` a file or the address of a bucket.

    **Example:**

        >>> Checkpoints("run/checkpoints", resume=True).every
        60.0
    """

    folder: str | Path
    resume: bool = False
    every: float | int = 60.0

    def __post_init__(self):
        check_nonnegative("every", self.every)
        if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(self.folder)):
            raise refuse(
                "folder", "be a folder of a file system that is mounted here", f"is {self.folder}"
            )
        if Path(self.folder).exists() and not Path(self.folder).is_dir():
            raise refuse("folder", "be a folder", f"is the file {self.folder}")


class Session:
    """One loop and its checkpoints, if it has any: without a folder every method does nothing."""

    def __init__(self, manager: Any, settings: Checkpoints | None, about: dict[str, str]):
        self._manager, self._settings, self._about = manager, settings, about
        self._folder = "" if settings is None else settings.folder
        self._last, self._told, self._at = time.monotonic(), False, -1
        self._offered = 0

    def restore(self, like: Callable[[int], Any]) -> tuple[int, Any] | None:
        """The round and the state of the latest checkpoint that can be read; None if there is none.

        **Args:** `like`: from a round to a state of the structure, shapes and shardings that it had then. What lay on other devices is
        moved to these.
        """
        if self._manager is None or self._settings is None:
            return None
        steps = sorted(self._manager.all_steps(), reverse=True)
        if steps and not self._settings.resume:
            raise refuse(
                "checkpoints",
                "be a folder without a run, or say resume=True to go on with the one that is there",
                f"{self._settings.folder} holds one that has come to round {steps[0]}",
            )
        for step in steps:
            try:
                about = self._manager.restore(
                    step, args=_orbax().Composite(about=_orbax().JsonRestore())
                )["about"]
            except Exception as error:
                self._passed_over(step, error)
                continue
            self._compare(about)
            arrays, rest = eqx.partition(like(step), eqx.is_array)
            leaves, structure = jax.tree.flatten(arrays)
            abstract = {name: _stored(x) for name, x in _numbered(leaves).items()}
            try:
                found = self._manager.restore(
                    step, args=_orbax().Composite(state=_orbax().StandardRestore(abstract))
                )["state"]
            except Exception as error:
                self._passed_over(step, error)
                continue
            self._at = step
            back = [_as_it_was(found[_name(i)], x) if x.size else x for i, x in enumerate(leaves)]
            return step, eqx.combine(structure.unflatten(back), rest)
        if steps:
            raise refuse(
                "checkpoints",
                "hold at least one checkpoint that can be read",
                f"{self._settings.folder} holds none",
            )
        return None

    def offer(self, step: int, state: Callable[[], Any], *, last: bool = False) -> None:
        """Save the state after `step` rounds if it is time to, if it is the last one, or if the process was told to end.

        **Args:** `state`: makes the state; called only if it is saved.
        **Raises:** `Terminated` in the last case. **Warns:** `RuntimeWarning` if it cannot be written; the next offer tries again.
        """
        if self._manager is None or self._settings is None:
            return
        self._offered = step
        due, told = _agreed(time.monotonic() - self._last >= self._settings.every, self._told)
        if (due or told or last) and step > self._at:
            self._save(step, jax.tree.leaves(eqx.filter(state(), eqx.is_array)))
            self._last = time.monotonic()
        if told:
            raise self.terminated(f" after round {step}")

    def _save(self, step: int, leaves: list[Any]) -> None:
        arrays = {name: x if _placed(x) else np.asarray(x) for name, x in _numbered(leaves).items()}
        kept = _orbax().Composite(
            state=_orbax().StandardSave(arrays), about=_orbax().JsonSave(self._about)
        )
        try:
            with _uninterrupted():
                if step in self._manager.all_steps():
                    self._manager.delete(step)  # it was passed over
                self._manager.save(step, args=kept, force=True)
                self._at = step
        except Exception as error:
            # Half a checkpoint would fill a full disk for good.
            _drop_halves(Path(self._folder))
            said = f"The checkpoint of round {step} in {self._folder} cannot be written: {_brief(error)}"
            warnings.warn(said, RuntimeWarning, stacklevel=3)

    def terminated(self, when: str = "") -> Terminated:
        """What ends a process that was told to."""
        if self._at >= self._offered:
            return Terminated(
                f"Told to end{when}; the run is saved in {self._folder} and goes on from there."
            )
        left = f"goes on from round {self._at}, which is" if self._at >= 0 else "is not"
        return Terminated(f"Told to end{when}; the run {left} saved in {self._folder}.")

    def told(self, *_: Any) -> None:
        """Take note that the process should end; the next offer, or the end of the session, will do so."""
        self._told = True

    def was_told(self) -> bool:
        """Whether any of the processes was told to end."""
        return any(_agreed(self._told))

    def _compare(self, about: dict[str, str]) -> None:
        for name in [*self._about, *about]:
            now, then = self._about.get(name, "absent"), about.get(name, "absent")
            if now != then:
                raise refuse(
                    "checkpoints",
                    "hold the run that is to go on",
                    f"{self._folder} holds one whose {name} is {then}, not {now}",
                )

    def _passed_over(self, step: int, error: Exception) -> None:
        said = f"The checkpoint of round {step} in {self._folder} cannot be read and is passed over: {_brief(error)}"
        warnings.warn(said, RuntimeWarning, stacklevel=3)


@contextlib.contextmanager
def session(checkpoints: Checkpoints | None, run: dict[str, Any]) -> Iterator[Session]:
    """Open the checkpoints of the run that these arguments (by name) make; without any, a session that does nothing.

    While it is open, SIGTERM is noted instead of ending the process (in the main thread, the only one that signals reach); when it closes
    without having heeded that, it raises `Terminated`.
    """
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refuse(
            "checkpoints", "be a folder that can be written", f"{folder} gives: {error.strerror}"
        ) from error
    made = versions()
    about = {name: describe(argument) for name, argument in run.items()}
    about |= {f"version of {name}": made[name] for name in ("esljax", "jax", "jaxlib")}
    options = _orbax().CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    manage = functools.partial(
        _orbax().CheckpointManager, folder, options=options, item_names=("state", "about")
    )
    with alone(folder, "checkpoints"), _quiet(), manage() as manager:
        _drop_halves(folder)
        opened = Session(manager, checkpoints, about)
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, opened.told) if main else None
        try:
            yield opened
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)
        # It came too late for the last offer, or there was none because the run had been finished before.
        if opened.was_told():
            raise opened.terminated()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until what is being written is whole."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    noted = []
    before = signal.signal(signal.SIGINT, lambda *_: noted.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if noted:
            signal.raise_signal(signal.SIGINT)


def _drop_halves(folder: Path) -> None:
    """Remove what writers that died, or failed, have left behind; the first process does, which holds the folder."""
    for half in folder.glob("*.orbax-checkpoint-tmp*") if jax.process_index() == 0 else ():
        shutil.rmtree(half, ignore_errors=True)


def _brief(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def alone(folder: Path, argument: str) -> Iterator[None]:
    """Hold a folder, so that no other run writes into it meanwhile. Of several processes that share a run the first one holds it.

    **Raises:** `InputError`, about `argument`, while another run holds it.
    """
    refusal = None
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                # A run that was killed on one host goes on on another, with nobody there to delete its lock.
                held.enter_context(locked(folder / ".lock", argument, elsewhere=False))
            except InputError as error:
                refusal = error
        if any(_agreed(refusal is not None)):
            raise refusal or refuse(
                argument, "have no other writer", "the first process says that it has one"
            )
        yield


def _agreed(*flags: bool) -> list[bool]:
    """Whether any process says so: all save together or none does."""
    if jax.process_count() == 1:
        return list(flags)
    from jax.experimental.multihost_utils import process_allgather

    return [bool(flag) for flag in np.any(process_allgather(np.asarray(flags)), axis=0)]


def _placed(x: Any) -> bool:
    """Whether anyone put an array anywhere in particular. What nobody did is the same in every process, and kept as numbers alone."""
    return isinstance(x, jax.Array) and x.committed


def _stored(x: Any) -> Any:
    return (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        if _placed(x)
        else np.zeros(x.shape, x.dtype)
    )


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    """What Orbax accepts of the leaves, by their places: no keys, and no arrays without entries."""
    return {
        _name(i): jax.random.key_data(x) if is_key(x) else x for i, x in enumerate(leaves) if x.size
    }


def _as_it_was(found: Any, like: Any) -> Any:
    """An array read back, as the kind of array that was saved."""
    if is_key(like):
        return jax.random.wrap_key_data(
            _as_it_was(found, jax.random.key_data(like)), impl=jax.random.key_impl(like)
        )
    if isinstance(like, jax.Array):
        # What lay nowhere in particular must not come back bound to one device.
        return found if _placed(like) else jnp.asarray(found)
    return np.asarray(found)


def _name(i: int) -> str:
    return f"{i:04d}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax talks through the logger of absl, and warns of choices that are made here on purpose."""
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
    """What is used of Orbax, imported on first use: it takes as long to load as jax."""
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
