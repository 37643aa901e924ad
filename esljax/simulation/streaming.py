"""A run whose members are on disk, read in blocks and folded into few coordinates (see `folding`).

Memory is a few blocks and the inner products of members, whatever the size of the model. One thread
reads the next block while others multiply the last one.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from esljax._checks import check_positive, door, refuse
from esljax.files import Stored, open_stored, writing
from esljax.simulation.folding import All, Near, Products
from esljax.simulation.trajectory import Folded, Trajectory, from_snapshots

# Coordinates of which a few are kept as they are stored, for what a diagnosis says of rounding.
_SAMPLE = 4096
# Columns of a piece of a block. Sums are taken piece by piece, however many threads share them.
_PIECE = 16384
# Seconds between two times that sums are saved.
_EVERY = 30.0
_HEAD = b"sums of esljax over a recording\n"


@door
def from_checkpoints(
    path: str | Path,
    times: Any = None,
    *,
    only: Iterable[str] | str = (),
    skip: Iterable[str] | str = (),
    name: str | None = None,
    by_key: bool = True,
    all_pairs: bool = False,
    memory: float = 2.56e8,
    sums: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Trajectory:
    """A run whose checkpoints are larger than memory, as a `Trajectory` of few coordinates.

    The members are turned into a space of a few coordinates, where the distances between them are
    the same: 4n for each parameter, or for all of them together. `speed_limit` then gives the
    numbers that it would give of the members themselves, with every error and finding, for
    transports that look at distances alone: `ExactTransport`, `SinkhornTransport` and
    `GaussianTransport`. Distances are kept between snapshots next to each other or next but one,
    and from each to the first; others are not.

    **Args:**
    - `path`, `only`, `skip`, `name`: as of `esl.recordings.read`.
    - `times`: when the snapshots were taken, shape (J+1,); by default as stored.
    - `by_key`: whether each parameter keeps coordinates of its own, for `SpeedLimit.by_key`.
    - `all_pairs`: whether the distances between any two snapshots are kept, as projections of the
      run need them (`principal_directions(path.positions, p)`): (J+1) n coordinates, and J/8 times
      the products.
    - `memory`: bytes of the blocks that are in memory at a time.
    - `sums`: a file for the sums so far, saved every half minute. A run that was killed goes on
      from there, to the same bits, if nothing in the recording has changed. Removed at the end.
    - `progress`: called with the bytes read so far, and those in all.

    **Returns:** `Trajectory` with `folded`; it has no potential, projection or features of its own.
    **Raises:** `InputError` as `esl.recordings.read` and `esl.from_snapshots` do. Checksums of .npz
    are not verified.
    **Differentiation:** none.

    **Example:**

        >>> import pathlib
        >>> import tempfile
        >>> import numpy as np
        >>> import esljax as esl
        >>> random = np.random.default_rng(0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in range(4):
        ...         place = pathlib.Path(folder, f"seed{seed}")
        ...         place.mkdir()
        ...         for step in (0, 10, 20):
        ...             np.savez(place / f"step{step}.npz", w=random.normal(size=(50, 50)))
        ...     print(esl.from_checkpoints(folder))
        Trajectory: 4 members of 2500 coordinates, folded into 16, recorded, 3 snapshots
    """
    check_positive("memory", memory)
    stored = open_stored(path, only=only, skip=skip, name=name)
    snapshots, members, d = stored.shape
    if snapshots < 2 or members < 2 or d < 1:
        raise refuse(
            "recording",
            "hold at least two snapshots of at least two members",
            f"has shape {stored.shape}",
        )
    named = by_key and stored.keys is not None
    plan = _Plan(stored, named, All if all_pairs else Near, memory)
    state = _summed(plan, None if sums is None else Path(sums), progress)
    keys = {key: (part.shape[2],) for key, part in state.parts.items()}
    few = from_snapshots(
        np.concatenate(list(state.parts.values()), axis=2),
        stored.times if times is None else times,
        observed=stored.observed,
        keys=keys if named else None,
    )
    sample = jnp.asarray(np.concatenate(state.sample, axis=2), few.positions.dtype)
    sizes = tuple(stored.sizes.values()) if named else (d,)
    return dataclasses.replace(few, folded=Folded(sample, sizes, all_pairs))


# --- Sums over a recording ------------------------------------------------------------------------


class _Block(NamedTuple):
    """Neighboring numbers of one parameter."""

    group: str
    """The name of the coordinates that the parameter is folded into."""
    key: str
    skipped: int
    count: int
    ends: bool
    """Whether it is the last of its group."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is summed, and in which blocks."""

    stored: Stored
    named: bool
    """Whether each parameter has coordinates of its own."""
    kind: type[Near] | type[All]
    memory: float

    @functools.cached_property
    def blocks(self) -> list[_Block]:
        """The blocks in the order in which they are read."""
        stored, named = self.stored, self.named
        snapshots, members, _ = stored.shape
        # Two at a time, one of which is being read.
        width = int(self.memory / 2 / (snapshots * members * stored.dtype.itemsize))
        width = max(width // _PIECE * _PIECE, min(width, _PIECE), 1)
        blocks = []
        for key, size in stored.sizes.items():
            # What cannot be read in parts would be read again for each of them.
            step = width if stored.in_parts(key) else size
            blocks += [
                _Block(key if named else "", key, start, min(step, size - start), False)
                for start in range(0, size, step)
            ]
        groups = [block.group for block in blocks]
        ends = [group != after for group, after in zip(groups, [*groups[1:], None], strict=True)]
        return [block._replace(ends=end) for block, end in zip(blocks, ends, strict=True)]

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the recording and of its blocks, which changes with any of its files."""
        states = [(path, path.stat()) for path in self.stored.files()]
        files = [(str(path), state.st_size, state.st_mtime_ns) for path, state in states]
        told = repr((files, self.stored.shape, self.kind.__name__, self.blocks, _PIECE))
        return hashlib.sha256(told.encode()).hexdigest()

    @functools.cached_property
    def before(self) -> dict[str, int]:
        """How many numbers of a member come before those of each parameter."""
        sizes = self.stored.sizes
        return dict(zip(sizes, itertools.accumulate([0, *sizes.values()]), strict=False))

    def nothing(self) -> Products:
        """Return the products over no coordinates."""
        return self.kind.nothing(*self.stored.shape[:2])

    def kept(self, block: _Block) -> bool:
        """Whether the numbers of a group are no more than the coordinates of its fold, and are kept
        as they are."""
        size = self.stored.sizes[block.key] if self.named else self.stored.shape[2]
        return size <= self.nothing().coordinates


@dataclasses.dataclass(frozen=True)
class _State:
    """The sums over the blocks so far."""

    done: int
    """The blocks that are in the sums."""
    products: Products
    """Over the present group of coordinates."""
    alike: np.ndarray
    """For each member the first one with the same numbers in the present group, shape (n,)."""
    columns: list[np.ndarray]
    """The numbers of the present group, if it is so small that they are kept as they are."""
    parts: dict[str, np.ndarray]
    """The coordinates of each group that is done, shape (J+1, n, p)."""
    sample: list[np.ndarray]
    """Numbers as they are stored, shape (J+1, n, count)."""

    @classmethod
    def fresh(cls, plan: _Plan) -> "_State":
        """Return the sums over nothing."""
        return cls(0, plan.nothing(), np.zeros(plan.stored.shape[1], int), [], {}, [])

    def saved(self, path: Path, identity: str) -> None:
        """Write the sums, whole or not at all."""
        arrays: dict[str, Any] = {f"part {name}": part for name, part in self.parts.items()}
        arrays |= {f"column {k}": part for k, part in enumerate(self.columns)}
        arrays |= {f"sample {k}": part for k, part in enumerate(self.sample)}
        arrays |= {f"product {name}": part for name, part in self.products._asdict().items()}
        arrays |= {"alike": self.alike}
        about = np.array([identity, str(self.done)])
        content = io.BytesIO()
        np.savez(content, about=about, **arrays)
        writing.replace(path, _HEAD + content.getvalue(), argument="sums", ours=_is_sums)

    @classmethod
    def resumed(cls, path: Path, plan: _Plan) -> "_State | None":
        """Return the sums in a file; None if it is not there or of another recording."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if not _is_sums(content):
            return None
        with np.load(io.BytesIO(content[len(_HEAD) :]), allow_pickle=False) as held:
            if str(held["about"][0]) != plan.identity:
                return None

            def named(kind: str) -> dict[str, np.ndarray]:
                names = [name for name in held.files if name.startswith(f"{kind} ")]
                return {name.partition(" ")[2]: held[name] for name in names}

            return cls(
                int(held["about"][1]),
                plan.kind(*named("product").values()),
                held["alike"],
                list(named("column").values()),
                named("part"),
                list(named("sample").values()),
            )


def _is_sums(content: bytes) -> bool:
    return content.startswith(_HEAD)


def _summed(plan: _Plan, file: Path | None, progress: Callable[[int, int], None] | None) -> _State:
    """Return the sums over a whole recording."""
    stored, blocks = plan.stored, plan.blocks
    state = None if file is None else _State.resumed(file, plan)
    state = _State.fresh(plan) if state is None else state
    row = stored.nbytes // stored.shape[2]
    read, saved = sum(block.count for block in blocks[: state.done]) * row, time.monotonic()
    try:
        for block, numbers, pieces in _read(plan, state.done):
            state = _added(state, plan, block, numbers, pieces)
            read += block.count * row
            if progress is not None:
                progress(read, stored.nbytes)
            if file is not None and time.monotonic() > saved + _EVERY:
                state.saved(file, plan.identity)
                saved = time.monotonic()
    except BaseException:
        if file is not None and state.done:
            state.saved(file, plan.identity)
        raise
    if file is not None:
        file.unlink(missing_ok=True)
    return state


_Pieces = Callable[[np.ndarray], list[Products]]


def _read(plan: _Plan, done: int) -> Iterator[tuple[_Block, np.ndarray, _Pieces]]:
    """Yield each block with its numbers (J+1, n, count), while the next one is read, and a function
    that multiplies the pieces of a block on all cores."""
    stored, blocks = plan.stored, plan.blocks[done:]
    snapshots, members, _ = stored.shape
    width = max((block.count for block in blocks), default=0)
    room = [np.empty(snapshots * members * width, stored.dtype) for _ in range(min(2, len(blocks)))]

    def fill(place: int) -> np.ndarray:
        block = blocks[place]
        shape = snapshots, members, block.count
        numbers = room[place % 2][: snapshots * members * block.count].reshape(shape)
        stored.read(block.key, block.skipped, numbers)
        return numbers

    def pieces(numbers: np.ndarray) -> list[Products]:
        cuts = range(0, numbers.shape[2], _PIECE)
        parts = [numbers[:, :, cut : cut + _PIECE] for cut in cuts]
        return list(workers.map(plan.kind.of, parts))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with (
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        concurrent.futures.ThreadPoolExecutor(cores) as workers,
    ):
        waiting = [reader.submit(fill, 0)] if blocks else []
        for place, block in enumerate(blocks):
            numbers = waiting.pop().result()
            if place + 1 < len(blocks):
                waiting.append(reader.submit(fill, place + 1))
            yield block, numbers, pieces


def _added(
    state: _State, plan: _Plan, block: _Block, numbers: np.ndarray, pieces: _Pieces
) -> _State:
    """Return the sums with a block more. The given ones stay whole, whenever a signal comes."""
    stride = -(-plan.stored.shape[2] // _SAMPLE)
    first = -(plan.before[block.key] + block.skipped) % stride
    sample = [*state.sample, numbers[:, :, first::stride].copy()]
    alike = _alike(numbers, state.alike)
    products, columns, parts = state.products, state.columns, state.parts
    if plan.kept(block):
        apart = numbers.astype(np.float64)
        _check_finite(np.asarray(np.isfinite(apart).all(axis=2)))
        columns = [*columns, apart - apart[0].mean(axis=0)]
    else:
        for part in pieces(numbers):
            products = products.plus(part)  # pyright: ignore[reportArgumentType]
    if block.ends:
        if not plan.kept(block):
            _check_finite(_finite(products))
            kept, of = np.unique(alike, return_inverse=True)
            columns = [products.among(kept).placed()[:, of]]
        parts = {**parts, block.group: np.concatenate(columns, axis=2)}
        products, alike, columns = plan.nothing(), np.zeros_like(alike), []
    return _State(state.done + 1, products, alike, columns, parts, sample)


def _alike(numbers: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Return for each member the first with the same numbers, among those that were alike."""

    def equal(i: int, k: int) -> bool:
        # A few numbers tell most members apart.
        first = (numbers[:, i, :8] == numbers[:, k, :8]).all()
        return bool(first) and np.array_equal(numbers[:, i], numbers[:, k])

    found = alike.copy()
    for i in range(len(alike)):
        same = (k for k in range(i) if alike[k] == alike[i] and found[k] == k)
        found[i] = next((k for k in same if equal(i, k)), i)
    return found


def _finite(products: Products) -> np.ndarray:
    """Return whether each member is finite at each snapshot, shape (J+1, n)."""
    finite = np.asarray(np.isfinite(products.squares()))
    if not finite[0].all():
        # One that is not spoils the mean of the start, and so X of all; its increment tells which.
        finite[0] = finite[1]
    return finite


def _check_finite(finite: np.ndarray) -> None:
    if not finite.all():
        snapshot, member = (int(k) for k in np.argwhere(~finite)[0])
        raise refuse("recording", "be finite", f"is not for member {member} at snapshot {snapshot}")
