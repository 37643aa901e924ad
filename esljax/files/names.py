"""Numbers in the names of files and folders: which member, and when.

The names of one level agree in all but one number: `step_100.npz`, `step_200.npz`. A name that
does not fit is refused rather than measured, because `best_0.93.npz` is no snapshot at time 0.93.

    step_000100_of_5, step_000200_of_5      100, 200: the other numbers stay the same
    epoch=3-step=100, epoch=4-step=200      100, 200: a step is a better clock than an epoch
    epoch=3-step=9, epoch=4-step=1          refused: steps that start again in each epoch
    step_-100, t_-0.5, step_1e3             -100, -0.5, 1000
    checkpoint-500                          500: behind a word, a hyphen separates
    t-3, t-2                                refused: -3 or 3
    step_100_loss_0.9, step_200_loss_0.8    100, 200
    3_17, 4_25                              refused: either number could be meant
    step-1,000, step-2,500                  refused: 1 or 1000
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from esljax._checks import InputError, refuse
from esljax.files.archives import FILES, PICKLES

# A sign or a point belongs to the number unless something stands before it that it separates.
_SIGN = r"(?:(?<![0-9A-Za-z)\].])[-+])?"
_DIGITS = r"(?:[0-9]+(?:\.[0-9]+)?|(?<![0-9A-Za-z])\.[0-9]+)"
_POWER = r"(?:[eE][-+]?[0-9]+(?![0-9A-Za-z.]))?"
_NUMBER = re.compile(_SIGN + _DIGITS + _POWER)
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}_[0-9]{3}")
_CHOSEN = r"(?<![0-9.])([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)(?![0-9])"
# Words before a number that make it the one which is meant, the best first.
_CLOCKS = (
    {"step", "steps", "iter", "iters", "iteration", "iterations", "it", "itr", "update", "updates"},
    {"checkpoint", "ckpt", "time", "t", "batch", "batches"},
    {"epoch", "epochs", "ep"},
)
_MEMBERS = ({"member", "members"}, {"replica", "seed"}, {"run", "trial", "model"})


class _Name(NamedTuple):
    """A name, cut at its numbers."""

    path: Path
    texts: tuple[str, ...]
    """What stands around the numbers, one more than they are."""
    numbers: tuple[str, ...]

    def like(self, index: int, varying: set[int]) -> str:
        """The pattern that chooses this name and those that differ from it in these numbers."""
        middle = (
            "{}" if i == index else "*" if i in varying else number
            for i, number in enumerate(self.numbers)
        )
        whole = "".join(text + number for text, number in zip(self.texts, middle, strict=False))
        return whole + self.texts[-1].removesuffix(self.path.suffix if _is_file(self.path) else "")


def has_number(path: Path) -> bool:
    """Return whether a name has a number in it, apart from the suffix of a file."""
    return bool(_cut(path).numbers)


def numbered(
    folders: Mapping[Path, Sequence[Path]], name: str | None, *, members: bool = False
) -> dict[Path, dict[float, Path]]:
    """Return the entries of each folder by the number in their names.

    **Args:** `folders`: the entries of each of several folders of one level, whose names must all
    agree. `name`: the pattern of the names that count, such as `step_{}`; by default all that have
    a number. `members`: whether the numbers are those of members rather than times.
    **Raises:** `InputError` if names differ in more than a number, or two have the same number.
    """
    if name is not None:
        return {folder: _matching(folder, inside, name) for folder, inside in folders.items()}
    cut = {
        folder: [one for one in map(_cut, inside) if one.numbers]
        for folder, inside in folders.items()
    }
    names = [one for inside in cut.values() for one in inside]
    if not names:
        return {folder: {} for folder in folders}
    labels = _MEMBERS if members else _CLOCKS
    kinds = Counter(_kind(one) for one in names)
    end = "/" if members else ""
    if len(kinds) > 1:
        raise _of_several_kinds(cut, kinds, labels, end)
    index = _meant(cut, labels, end)
    if not members:
        _refuse_disagreement(cut, index)
        _refuse_digits_apart(cut, index)
    return {
        folder: _by_number(folder, [(one.path, _value(one.numbers[index])) for one in inside])
        for folder, inside in cut.items()
    }


def swapped(folders: Iterable[Path], inside: Iterable[Path]) -> bool:
    """Return whether names say that folders are times, and what is in them members."""

    def says(paths: Iterable[Path], labels: Sequence[set[str]]) -> bool:
        return any(_has_label(_cut(path).texts, labels) for path in paths)

    folders, inside = list(folders), list(inside)
    as_meant = says(folders, _MEMBERS) or says(inside, _CLOCKS)
    return says(folders, _CLOCKS) and says(inside, _MEMBERS) and not as_meant


def patterns(name: str | None) -> tuple[str | None, str | None]:
    """Return the patterns of the members' folders and of the checkpoints.

    **Raises:** `InputError` for a pattern without one `{}` for the number.
    """
    if name is None:
        return None, None
    member, slash, checkpoint = name.rpartition("/") if isinstance(name, str) else ("", "/", "")
    parts = [part for part in (member, checkpoint) if part]
    if not parts or (slash and not member) or any(part.count("{}") != 1 for part in parts):
        raise refuse(
            "name",
            "hold {} once where the number stands, as in 'step_{}', 'member_{}/step_{}' or "
            "'member_{}/'",
            f"is {name!r}",
        )
    return member or None, checkpoint or None


def _matching(folder: Path, entries: Iterable[Path], name: str) -> dict[float, Path]:
    before, after = (
        re.escape(part).replace(r"\*", ".*").replace(r"\?", ".") for part in name.split("{}")
    )
    pattern = re.compile(before + _CHOSEN + after, re.DOTALL)
    found = []
    for entry in entries:
        stem = entry.name.removesuffix(entry.suffix) if _is_file(entry) else entry.name
        match = pattern.fullmatch(stem) or pattern.fullmatch(entry.name)
        if match:
            found.append((entry, _value(match[1])))
    if not found:
        raise refuse(
            "name", f"match names in {folder}", f"{name!r} matches none of {_few(entries)}"
        )
    return _by_number(folder, found)


def _by_number(folder: Path, found: Iterable[tuple[Path, float]]) -> dict[float, Path]:
    by_number: dict[float, Path] = {}
    for path, number in found:
        if number in by_number:
            raise refuse(
                "recording",
                "name each member and time once",
                f"{folder} has both {by_number[number].name} and {path.name}",
            )
        if not math.isfinite(number):
            raise refuse(
                "recording", "have finite numbers in its names", f"{folder} has {path.name}"
            )
        by_number[number] = path
    return by_number


def _value(number: str) -> float:
    return float(number)


def _is_file(path: Path) -> bool:
    return path.suffix.lower() in (*FILES, *PICKLES)


def _cut(path: Path) -> _Name:
    stem = path.name.removesuffix(path.suffix) if _is_file(path) else path.name
    numbers = tuple(_NUMBER.findall(stem))
    texts = _NUMBER.split(stem)
    return _Name(path, (*texts[:-1], texts[-1] + path.name[len(stem) :]), numbers)


def _kind(one: _Name) -> tuple[str, ...]:
    return one.texts


def _few(paths: Iterable[Path]) -> str:
    names = sorted({path.name for path in paths})
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def _meant(cut: Mapping[Path, Sequence[_Name]], labels: Sequence[set[str]], end: str) -> int:
    """Return which of the numbers of the names, which are of one kind, is the one that counts."""
    example = next(one for inside in cut.values() for one in inside)
    varying = _varying(cut)
    index = _labelled(example, varying or set(range(len(example.numbers))), labels)
    if index is None and varying:
        first = example.like(min(varying), varying) + end
        last = example.like(max(varying), varying) + end
        few = _few(one.path for inside in cut.values() for one in inside)
        raise refuse(
            "recording",
            f"have names that differ in one number (choose one by name={first!r} or {last!r})",
            f"{few} differ in {len(varying)}",
        )
    index = len(example.numbers) - 1 if index is None else index
    before = example.texts[index]
    # The order of members does not matter, that of times does.
    if not end and re.search(r"(?:^|[^A-Za-z])[A-Za-z]-$", before):
        sign = example.like(index, varying)
        raise refuse(
            "recording",
            f"have names whose sign is clear (choose by name={sign!r} for a hyphen, or "
            f"{sign.replace('-{}', '{}')!r} for a minus)",
            f"{example.path.name} may be either",
        )
    return index


def _refuse_disagreement(cut: Mapping[Path, Sequence[_Name]], index: int) -> None:
    """Reject times that go back where another clock in the names goes on."""
    varying = _varying(cut) - {index}
    for folder, inside in cut.items():
        ordered = sorted(inside, key=lambda one: _value(one.numbers[index]))
        for other in varying:
            clock = any(_label(ordered[0].texts[other]) in words for words in _CLOCKS)
            for before, after in itertools.pairwise(ordered):
                if clock and _value(after.numbers[other]) < _value(before.numbers[other]):
                    pattern = before.like(index, varying)
                    raise refuse(
                        "recording",
                        f"have names whose numbers agree on the order (choose by name={pattern!r})",
                        f"{before.path.name} and {after.path.name} in {folder} do not",
                    )


def _refuse_digits_apart(cut: Mapping[Path, Sequence[_Name]], index: int) -> None:
    """Reject times that may go on behind a comma, or behind an underscore before three digits."""
    varying = _varying(cut)
    names = [one for inside in cut.values() for one in inside]
    mark = names[0].texts[index + 1]
    if index + 1 not in varying or mark not in (",", "_"):
        return
    digits = ["_".join(one.numbers[index : index + 2]) for one in names]
    if mark == "_" and not all(map(_THOUSANDS.fullmatch, digits)):
        return
    pattern = names[0].like(index, varying)
    raise refuse(
        "recording",
        "have times whose digits stand together (rename them, or choose the first alone by "
        f"name={pattern!r})",
        f"{names[0].path.name} has {mark!r} between them",
    )


def _varying(cut: Mapping[Path, Sequence[_Name]]) -> set[int]:
    """Return which numbers differ within a folder."""
    return {
        index
        for inside in cut.values()
        for index in range(len(inside[0].numbers) if inside else 0)
        if len({_value(one.numbers[index]) for one in inside}) > 1
    }


def _labelled(example: _Name, indices: set[int], labels: Sequence[set[str]]) -> int | None:
    """Return the only index, or the only one behind the best word."""
    if len(indices) == 1:
        return next(iter(indices))
    for words in labels:
        found = [index for index in indices if _label(example.texts[index]) in words]
        if len(found) == 1:
            return found[0]
    return None


def _label(text: str) -> str:
    """Return the word before a number."""
    word = re.search(r"([A-Za-z]+)[^A-Za-z0-9]*$", text)
    return word[1].lower() if word else ""


def _has_label(texts: Sequence[str], labels: Sequence[set[str]]) -> bool:
    return any(_label(text) in words for text in texts[:-1] for words in labels)


def _of_several_kinds(
    cut: Mapping[Path, Sequence[_Name]], kinds: Counter, labels: Sequence[set[str]], end: str
) -> InputError:
    most = max(kinds, key=lambda kind: (kinds[kind], _has_label(kind, labels)))
    fitting = {
        folder: [one for one in inside if _kind(one) == most] for folder, inside in cut.items()
    }
    varying = _varying(fitting)
    example = next(one for inside in fitting.values() for one in inside)
    index = _labelled(example, varying or set(range(len(example.numbers))), labels)
    chosen = max(varying, default=0) if index is None else index
    pattern = example.like(chosen, varying) + end
    folder, odd = next(
        (folder, one) for folder, inside in cut.items() for one in inside if _kind(one) != most
    )
    count = kinds[most]
    others = kinds.total() - count
    more = f" and {others - 1} more" if others > 1 else ""
    return refuse(
        "recording",
        f"have names that agree in all but one number (choose by name={pattern!r}, or move the "
        "others away)",
        f"{odd.path.name}{more} in {folder} differ{'s' * (others == 1)} from {pattern!r}, which "
        f"{count} names fit",
    )
