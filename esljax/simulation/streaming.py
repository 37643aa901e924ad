"""A run whose members are on disk, read in blocks and folded into few coordinates (see `folding`).

Memory is a few blocks and the inner products of members, whatever the size of the model. One thread
reads the next block while others multiply the last one.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from esljax._checks import check_positive, door, refuse
from esljax.files import Stored, open_stored, writing
from esljax.simulation.folding import Products, folded, no_products, products_of
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
    - `memory`: bytes of the blocks that are in memory at a time.
    - `sums`: a file for the sums so far, saved every half minute. A run that was killed goes on from
      there, to the same bits, if nothing in the recording has changed. Removed at the end.
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
    file = None if sums is None else Path(sums)
    named = by_key and stored.keys is not None
    state = _summed(stored, named, memory, None if sums is None else Path(sums), progress)
    keys = {key: (part.shape[2],) for key, part in state.parts.items()}
    few = from_snapshots(
        np.concatenate(list(state.parts.values()), axis=2),
        stored.times if times is None else times,
        observed=stored.observed,
        keys=keys if named else None,
    )
    sample = jnp.asarray(np.concatenate(state.sample, axis=2), few.positions.dtype)
    sizes = tuple(stored.sizes.values()) if named else (d,)
    return dataclasses.replace(few, folded=Folded(sample, sizes))


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


def _blocks(stored: Stored, named: bool, memory: float) -> list[_Block]:
    """Return the blocks of a recording in the order in which they are read."""
    snapshots, members, _ = stored.shape
    # Two at a time, one of which is being read.
    width = int(memory / 2 / (snapshots * members * stored.dtype.itemsize))
    width = max(width // _PIECE * _PIECE, min(width, _PIECE), 1)
    sizes = {key: size for key, size in stored.sizes.items() if size}
    blocks = []
    for key, size in sizes.items():
        # What cannot be read in parts would be read again for each of them.
        step = width if stored.in_parts(key) else size
        starts = range(0, size, step)
        blocks += [
            _Block(key if named else "", key, start, min(step, size - start), named)
            for start in starts
        ]
    following = [block.group for block in blocks[1:]]
    ends = [group != block.group for block, group in zip(blocks, following, strict=False)]
    return [block._replace(ends=end) for block, end in zip(blocks, [*ends, True], strict=True)]


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
    def fresh(cls, stored: Stored) -> "_State":
        snapshots, members, _ = stored.shape
        nothing = no_products(snapshots, members)
        return cls(0, nothing, np.zeros(members, int), [], {}, [])

    def saved(self, path: Path, identity: str) -> None:
        """Write the sums, whole or not at all."""
        arrays = {f"part {name}": part for name, part in self.parts.items()}
        arrays |= {f"column {k}": part for k, part in enumerate(self.columns)}
        arrays |= {f"sample {k}": part for k, part in enumerate(self.sample)}
        arrays |= {"start": self.products.start, "links": self.products.links, "alike": self.alike}
        about = np.array([identity, str(self.done)])
        content = io.BytesIO()
        np.savez(content, about=about, **arrays)
        writing.replace(path, _HEAD + content.getvalue(), argument="sums", ours=_is_sums)

    @classmethod
    def resumed(cls, path: Path, identity: str) -> "_State | None":
        """Return the sums in a file; None if it is not there or of another recording."""
        try:
            content = path.read_bytes()
        except OSError:
            return None
        if not _is_sums(content):
            return None
        with np.load(io.BytesIO(content[len(_HEAD) :]), allow_pickle=False) as held:
            if str(held["about"][0]) != identity:
                return None

            def named(kind: str) -> dict[str, np.ndarray]:
                names = [name for name in held.files if name.startswith(f"{kind} ")]
                return {name.partition(" ")[2]: held[name] for name in names}

            return cls(
                int(held["about"][1]),
                Products(held["start"], held["links"]),
                held["alike"],
                list(named("column").values()),
                named("part"),
                list(named("sample").values()),
            )


def _is_sums(content: bytes) -> bool:
    return content.startswith(_HEAD)


def _identity(stored: Stored, blocks: list[_Block]) -> str:
    """Return a digest of a recording and of its blocks, which changes with any of its files."""
    files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in stored.files()]
    told = repr((files, stored.shape, stored.dtype.str, blocks, _PIECE))
    return hashlib.sha256(told.encode()).hexdigest()


def _summed(
    stored: Stored,
    named: bool,
    memory: float,
    file: Path | None,
    progress: Callable[[int, int], None] | None,
) -> _State:
    """Return the sums over a whole recording."""
    blocks = _blocks(stored, named, memory)
    identity = _identity(stored, blocks)
    state = None if file is None else _State.resumed(file, identity)
    state = _State.fresh(stored) if state is None else state
    row = stored.nbytes // stored.shape[2]
    read, saved = sum(block.count for block in blocks[: state.done]) * row, time.monotonic()
    try:
        for block, numbers, pieces in _read(stored, blocks[state.done :]):
            state = _added(state, stored, block, numbers, pieces)
            read += block.count * row
            if progress is not None:
                progress(read, stored.nbytes)
            if file is not None and time.monotonic() > saved + _EVERY:
                state.saved(file, identity)
                saved = time.monotonic()
    except BaseException:
        if file is not None and state.done:
            state.saved(file, identity)
        raise
    if file is not None:
        file.unlink(missing_ok=True)
    return state


_Pieces = Callable[[np.ndarray], list[Products]]


def _read(stored: Stored, blocks: list[_Block]) -> Iterator[tuple[_Block, np.ndarray, _Pieces]]:
    """Yield each block with its numbers (J+1, n, count), while the next one is read, and a function
    that multiplies the pieces of a block on all cores."""
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
        return list(workers.map(products_of, parts))

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
    state: _State, stored: Stored, block: _Block, numbers: np.ndarray, pieces: _Pieces
) -> _State:
    """Return the sums with a block more. The given ones stay whole, whenever a signal comes."""
    snapshots, members, d = stored.shape
    sizes = stored.sizes
    stride = -(-d // _SAMPLE)
    before = sum(size for key, size in sizes.items() if key < block.key) + block.skipped
    sample = numbers[:, :, -before % stride :: stride].copy()
    alike = _alike(numbers, state.alike)
    products, columns, parts = state.products, state.columns, state.parts
    # As many coordinates as a fold would have; then the numbers themselves are better.
    small = (sizes[block.key] if block.group == block.key else d) <= 4 * members
    if small:
        apart = numbers.astype(np.float64)
        _check_finite(np.isfinite(apart).all(axis=2))
        columns = [*columns, apart - apart[0].mean(axis=0)]
    else:
        for part in pieces(numbers):
            products = products.plus(part)
    if block.ends:
        if not small:
            _check_finite(_finite(products))
            kept, of = np.unique(alike, return_inverse=True)
            columns = [folded(products.among(kept))[:, of]]
        parts = {**parts, block.group: np.concatenate(columns, axis=2)}
        products, alike, columns = no_products(snapshots, members), np.zeros_like(alike), []
    done = state.done + 1
    return _State(done, products, alike, columns, parts, [*state.sample, sample])


def _alike(numbers: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Return for each member the first with the same numbers, among those that were alike."""
    found = alike.copy()
    for i in range(len(alike)):
        same = (k for k in range(i) if alike[k] == alike[i] and found[k] == k)
        equal = (k for k in same if np.array_equal(numbers[:, i], numbers[:, k]))
        found[i] = next(equal, i)
    return found


def _finite(products: Products) -> np.ndarray:
    """Return whether each member is finite at each snapshot, shape (J+1, n), as far as its
    increments tell."""
    members = len(products.start)
    own = np.diagonal(products.links[:, :, 3 * members :], axis1=1, axis2=2)
    return np.isfinite(np.concatenate([np.diagonal(products.start)[None], own]))


def _check_finite(finite: np.ndarray) -> None:
    if not finite.all():
        snapshot, member = (int(k) for k in np.argwhere(~finite)[0])
        raise refuse("recording", "be finite", f"is not for member {member} at snapshot {snapshot}")
