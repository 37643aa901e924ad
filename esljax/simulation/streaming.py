"""A run whose members are on disk, read in blocks and folded into few coordinates (see `folding`).

Memory is a few blocks and the inner products of members, whatever the size of the model. Each of a
few threads reads a block and multiplies it, so that some wait for the disk while others compute.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from esljax._checks import (
    InputError,
    as_float,
    check_finite,
    check_key,
    check_positive,
    check_positive_int,
    door,
    in_words,
    refuse,
)
from esljax._types import Key
from esljax.files import Stored, open_stored, writing
from esljax.simulation.folding import All, Near, Products
from esljax.simulation.projecting import Along, joined, spread
from esljax.simulation.trajectory import Folded, Trajectory, from_snapshots, rescaled
from esljax.transport import normal_rows

# Coordinates of which a few are kept as they are stored, for what a diagnosis says of rounding.
_SAMPLE = 4096
# Columns of a piece of a block. Sums are taken piece by piece, however many threads share them.
_PIECE = 16384
# Blocks in memory at a time, whatever the machine: sums are saved by blocks.
_AT_ONCE = 4
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
    coordinates: int = 0,
    key: Key | None = None,
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
    - `coordinates`, `key`: how many random directions to keep the members along, 0 for none, and
      the key to draw them from. `ProjectedTransport(transport, path.folded.directions)` is then
      that of `random_directions(d, coordinates, key)` for members in memory: coordinates are p
      more for each parameter.
    - `memory`: bytes of the blocks that are in memory at a time.
    - `sums`: a file for the sums so far, saved every half minute. A run that was killed goes on
      from there, to the same bits, if the file is whole and nothing in the recording has changed.
      Removed at the end, and where the recording is refused.
    - `progress`: called with the bytes read so far, and those in all.

    **Returns:** `Trajectory` with `folded`; it has no potential, projection or features of its own.
    **Raises:** `InputError` as `esl.recordings.read` and `esl.from_snapshots` do, if a file of the
    recording changes while it is read, and if `sums` cannot be written or is a file of another
    program. Checksums of .npz are not verified.
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
    check_positive("memory", as_float(memory, "memory"))
    check_finite("memory", memory)
    check_positive_int("coordinates", coordinates, 0)
    if coordinates or key is not None:
        check_key("key", key)
    stored = open_stored(path, only=only, skip=skip, name=name)
    snapshots, members, d = stored.shape
    if snapshots < 2 or members < 2 or d < 1:
        raise refuse(
            "recording",
            "hold at least two snapshots of at least two members",
            f"has shape {stored.shape}",
        )
    if coordinates > d:
        was = f"is {coordinates}"
        raise refuse("coordinates", f"be at most {d}, the numbers in one member", was)
    times = stored.times if times is None else times
    # Before hours of reading; the trajectory takes them as they are.
    rescaled(times, snapshots, jnp.result_type(float))
    file = None if sums is None else _claimed(sums)
    named = by_key and stored.keys is not None
    kind = All if all_pairs else Near
    plan = _Plan(stored, named, kind, memory, coordinates, key)
    state = _summed(plan, file, progress)
    widths = {key: part.shape[2] for key, part in state.parts.items()}
    # A parameter without numbers has no part.
    keys = {key: (widths.get(key, 0),) for key in stored.sizes}
    few = from_snapshots(
        np.concatenate(list(state.parts.values()), axis=2),
        times,
        observed=stored.observed,
        keys=keys if named else None,
    )
    dtype = few.positions.dtype
    folded = Folded(
        jnp.asarray(np.concatenate(state.sample, axis=2), dtype),
        tuple(stored.sizes.values()) if named else (d,),
        all_pairs,
        directions=jnp.asarray(joined(list(state.factors.values())), dtype)
        if coordinates
        else None,
        spread=jnp.asarray(state.spread, dtype) if coordinates else None,
    )
    return dataclasses.replace(few, folded=folded)


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
    directions: int = 0
    """How many random directions the members are kept along."""
    key: Any = None

    @functools.cached_property
    def blocks(self) -> list[_Block]:
        """The blocks in the order in which they are read."""
        stored, named = self.stored, self.named
        snapshots, members, _ = stored.shape
        width = int(self.memory / _AT_ONCE / (snapshots * members * stored.dtype.itemsize))
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
    def files(self) -> dict[str, tuple[int, int]]:
        """The files of the recording as they were before they were read."""
        return self.stored.files()

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the recording and of its blocks, which changes with any of its files."""
        drawn = None if self.key is None else jax.random.key_data(self.key).tolist()
        how = self.kind.__name__, self.blocks, _PIECE, self.directions, drawn
        told = repr((self.files, self.stored.shape, how))
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
        return size <= self.nothing().coordinates + self.directions

    def normal(self, block: _Block, skipped: int, count: int) -> np.ndarray:
        """Return rows of the normal numbers behind the directions, after the first ones of a
        block."""
        first = self.before[block.key] + block.skipped + skipped
        return normal_rows(self.key, self.directions, first, count)


@dataclasses.dataclass(frozen=True)
class _State:
    """The sums over the blocks so far."""

    done: int
    """The blocks that are in the sums."""
    products: Products
    """Over the present group of coordinates."""
    along: Along
    """Over the same, if there are directions."""
    alike: np.ndarray
    """For each member the first one with the same numbers in the present group, shape (n,)."""
    columns: list[np.ndarray]
    """The numbers of the present group, if it is so small that they are kept as they are."""
    normal: list[np.ndarray]
    """The normal numbers of these."""
    parts: dict[str, np.ndarray]
    """The coordinates of each group that is done, shape (J+1, n, p)."""
    factors: dict[str, np.ndarray]
    """What takes them to the directions (`joined`), by group."""
    spread: float
    """The spread of all groups, if there are directions."""
    sample: list[np.ndarray]
    """Numbers as they are stored, shape (J+1, n, count)."""

    @classmethod
    def fresh(cls, plan: _Plan) -> "_State":
        """Return the sums over nothing."""
        snapshots, members, _ = plan.stored.shape
        along = Along.nothing(snapshots, members, plan.directions)
        alike = np.zeros(members, int)
        return cls(0, plan.nothing(), along, alike, [], [], {}, {}, 0.0, [])

    def saved(self, path: Path, identity: str) -> None:
        """Write the sums, whole or not at all.

        **Raises:** `InputError` if they cannot be written.
        """
        arrays: dict[str, Any] = {}
        for name in ("products", "along"):
            pairs = getattr(self, name)._asdict().items()
            arrays |= {f"{name} {key}": array for key, array in pairs}
        for name in ("parts", "factors"):
            arrays |= {f"{name} {key}": array for key, array in getattr(self, name).items()}
        for name in ("columns", "normal", "sample"):
            arrays |= {f"{name} {k}": array for k, array in enumerate(getattr(self, name))}
        about = np.array([identity, str(self.done)])
        content = io.BytesIO()
        np.savez(content, about=about, alike=self.alike, spread=self.spread, **arrays)
        try:
            writing.replace(path, _HEAD + content.getvalue(), argument="sums", ours=_HEAD)
        except OSError as error:
            was = f"{path} gives: {error.strerror}"
            raise refuse("sums", "be a file that can be written", was) from error

    @classmethod
    def resumed(cls, path: Path, plan: _Plan) -> "_State | None":
        """Return the sums in a file; None if it is not there, damaged or of another recording."""
        try:
            return cls._held(path.read_bytes(), plan)
        except Exception:  # on arbitrary bytes NumPy and zipfile fail in many ways
            return None

    @classmethod
    def _held(cls, content: bytes, plan: _Plan) -> "_State | None":
        with np.load(io.BytesIO(content[len(_HEAD) :]), allow_pickle=False) as held:
            if str(held["about"][0]) != plan.identity:
                return None

            def named(kind: str) -> dict[str, np.ndarray]:
                names = [name for name in held.files if name.startswith(f"{kind} ")]
                return {name.partition(" ")[2]: held[name] for name in names}

            return cls(
                done=int(held["about"][1]),
                products=plan.kind(*named("products").values()),
                along=Along(*named("along").values()),
                alike=held["alike"],
                columns=list(named("columns").values()),
                normal=list(named("normal").values()),
                parts=named("parts"),
                factors=named("factors"),
                spread=float(held["spread"]),
                sample=list(named("sample").values()),
            )


def _claimed(sums: str | Path) -> Path:
    """Return the file of the sums, in whose place nothing of others is and which can be written."""
    if not isinstance(sums, str | os.PathLike):
        raise refuse("sums", "be a path", f"is {in_words(sums)}")
    file = Path(sums)
    if not file.parent.is_dir():
        raise refuse("sums", "be a file in a folder that exists", f"is {file}")
    writing.claim([file], {}, force=True, argument="sums", ours=_HEAD)
    with writing.prepared(file.parent, "sums"):
        return file


def _summed(plan: _Plan, file: Path | None, progress: Callable[[int, int], None] | None) -> _State:
    """Return the sums over a whole recording."""
    stored, blocks = plan.stored, plan.blocks
    files = plan.files
    state = None if file is None else _State.resumed(file, plan)
    state = _State.fresh(plan) if state is None else state
    row = stored.nbytes // stored.shape[2]
    read, saved = sum(block.count for block in blocks[: state.done]) * row, time.monotonic()
    try:
        for block, sums in zip(blocks[state.done :], _read(plan, state.done), strict=True):
            state = _added(state, plan, block, sums)
            read += block.count * row
            if progress is not None:
                progress(read, stored.nbytes)
            if file is not None and time.monotonic() > saved + _EVERY:
                state.saved(file, plan.identity)
                saved = time.monotonic()
        _check_unchanged(files, stored.files())
    except BaseException as error:
        # A disk may come back. What is refused otherwise would be refused again.
        refused = isinstance(error, InputError) and not isinstance(error.__cause__, OSError)
        with contextlib.suppress(OSError, InputError):
            if file is not None and refused:
                file.unlink(missing_ok=True)
            elif file is not None and state.done:
                state.saved(file, plan.identity)
        raise
    if file is not None:
        file.unlink(missing_ok=True)
    return state


class _Sums(NamedTuple):
    """What one block adds."""

    products: list[Products]
    """Of its pieces."""
    along: list[Along]
    columns: np.ndarray | None
    """Its numbers, if they are kept as they are."""
    normal: np.ndarray | None
    alike: np.ndarray
    finite: np.ndarray
    """Whether each member is finite at each snapshot, shape (J+1, n)."""
    spread: float
    sample: np.ndarray


def _read(plan: _Plan, done: int) -> Iterator[_Sums]:
    """Yield what each block adds, in their order; a few are read and multiplied at a time."""
    stored, blocks = plan.stored, plan.blocks[done:]
    snapshots, members, _ = stored.shape
    row = snapshots * members
    width = max((block.count for block in blocks), default=0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # One more than there are cores, for the disk. Blocks that cannot be cut may be large.
    most = int(plan.memory / max(row * width * stored.dtype.itemsize, 1))
    threads = min((cores or 1) + 1, _AT_ONCE, max(most, 2), max(len(blocks), 1))
    rooms: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(threads):
        rooms.put(np.empty(row * width, stored.dtype))

    def sums(block: _Block) -> _Sums:
        room = rooms.get()
        try:
            numbers = room[: row * block.count].reshape(snapshots, members, block.count)
            stored.read(block.key, block.skipped, numbers)
            return _of_block(plan, block, numbers)
        finally:
            rooms.put(room)

    waiting: collections.deque[concurrent.futures.Future[_Sums]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(threads) as workers:
        try:
            for block in blocks:
                waiting.append(workers.submit(sums, block))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _of_block(plan: _Plan, block: _Block, numbers: np.ndarray) -> _Sums:
    """Return what the numbers (J+1, n, count) of a block add."""
    stride = -(-plan.stored.shape[2] // _SAMPLE)
    first = -(plan.before[block.key] + block.skipped) % stride
    products, along, columns, normal = [], [], None, None
    # A number that is not finite is told by its place below.
    with np.errstate(over="ignore", invalid="ignore"):
        if plan.kept(block):
            apart = numbers.astype(np.float64)
            columns = apart - apart[0].mean(axis=0)
            if plan.directions:
                normal = plan.normal(block, 0, block.count).astype(np.float64)
            sound = np.isfinite(columns).all()
        else:
            for skipped in range(0, block.count, _PIECE):
                piece = numbers[:, :, skipped : skipped + _PIECE]
                products.append(plan.kind.of(piece))
                if plan.directions:
                    along.append(Along.of(piece, plan.normal(block, skipped, piece.shape[2])))
            sound = all(np.isfinite(part.squares()).all() for part in products)
        around = spread(numbers) if plan.directions else 0.0
    # Looked for where products show that there is one.
    finite = np.ones(numbers.shape[:2], bool)
    if not sound:
        finite[...] = np.isfinite(numbers).all(axis=2)
    return _Sums(
        products=products,
        along=along,
        columns=columns,
        normal=normal,
        alike=_alike(numbers),
        finite=finite,
        spread=around,
        sample=numbers[:, :, first::stride].copy(),
    )


def _added(state: _State, plan: _Plan, block: _Block, sums: _Sums) -> _State:
    """Return the sums with a block more. The given ones stay whole, whenever a signal comes."""
    _check_finite(sums.finite)
    products, along, alike = state.products, state.along, _in_both(state.alike, sums.alike)
    for part in sums.products:
        products = products.plus(part)  # pyright: ignore[reportArgumentType]
    for part in sums.along:
        along = along.plus(part)
    columns, normal = list(state.columns), list(state.normal)
    if sums.columns is not None:
        columns.append(sums.columns)
    if sums.normal is not None:
        normal.append(sums.normal)
    new = dataclasses.replace(
        state,
        done=state.done + 1,
        products=products,
        along=along,
        alike=alike,
        columns=columns,
        normal=normal,
        spread=state.spread + sums.spread,
        sample=[*state.sample, sums.sample],
    )
    return _closed(new, plan, block.group) if block.ends else new


def _closed(state: _State, plan: _Plan, group: str) -> _State:
    """Return the sums with the present group of coordinates placed."""
    columns, normal = state.columns, state.normal
    if not columns:
        if not np.isfinite(state.products.squares()).all():
            must = "hold numbers whose squares double precision can add"
            raise refuse("recording", must, "holds larger ones")
        kept, of = np.unique(state.alike, return_inverse=True)
        products = state.products.among(kept)
        if plan.directions:
            rows, upper = state.along.among(kept).orthonormal()
            products = products.without(rows)
            columns = [np.cumsum(rows, axis=0)]
            normal = [upper, np.zeros((products.coordinates, plan.directions))]
        columns = [part[:, of] for part in (*columns, products.placed())]
    fresh = _State.fresh(plan)
    return dataclasses.replace(
        state,
        products=fresh.products,
        along=fresh.along,
        alike=fresh.alike,
        columns=[],
        normal=[],
        parts={**state.parts, group: np.concatenate(columns, axis=2)},
        factors={**state.factors, group: np.concatenate(normal)} if plan.directions else {},
    )


def _alike(numbers: np.ndarray) -> np.ndarray:
    """Return for each member the first with the same numbers."""

    def equal(i: int, k: int) -> bool:
        # A few numbers tell most members apart.
        first = (numbers[:, i, :8] == numbers[:, k, :8]).all()
        return bool(first) and np.array_equal(numbers[:, i], numbers[:, k])

    found = np.arange(numbers.shape[1])
    for i in range(len(found)):
        found[i] = next((k for k in range(i) if found[k] == k and equal(i, k)), i)
    return found


def _in_both(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each member the first that is alike by both."""
    _, first, of = np.unique(one * len(one) + other, return_index=True, return_inverse=True)
    return first[of]


def _check_unchanged(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    changed = sorted(dict(before.items() ^ after.items()))
    if changed:
        raise refuse("recording", "stay as it is while it is read", f"{changed[0]} has changed")


def _check_finite(finite: np.ndarray) -> None:
    if not finite.all():
        snapshot, member = (int(k) for k in np.argwhere(~finite)[0])
        raise refuse("recording", "be finite", f"is not for member {member} at snapshot {snapshot}")
