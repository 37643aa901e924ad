"""Checkpoints as other writers lay them out: members, their checkpoints, and what is in each.

    folder/member_000/step_000100.npz                     or .safetensors, or .npy
    folder/member_000/step_000100/                        written by Orbax: one pytree or several
    folder/member_000/100/default/, params/, opt_state/   a CheckpointManager of Orbax
    folder/member_000/checkpoint-500/model.safetensors    Hugging Face; also in shards
    folder/member_000/checkpoints/epoch=3-step=100.npz    one more folder between them
    folder/models--who--what-seed3/refs/step1000          the cache of the Hub: names of revisions

A checkpoint of several files or items has keys that begin with their names.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from esljax._checks import refuse
from esljax.files.archives import (
    FILES,
    PICKLES,
    Archive,
    decoding,
    is_orbax,
    joined,
    open_file,
    open_orbax,
    open_zarr,
    refuse_pickle,
    sharded,
)
from esljax.files.names import has_number, numbered, patterns, swapped

_LAYOUT = (
    "hold one folder for each member, each with its checkpoints, as in member_000/step_000100.npz"
)
_FOREIGN = (".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".gguf", ".pb", ".tflite", ".mat")
_FOREIGN += (".pdparams", ".params", ".index", ".ot", ".npy.gz", ".npz.gz", ".tar", ".gz", ".zip")
_SHARD = re.compile(r"(.*)-([0-9]+)-of-([0-9]+)\.safetensors")


def by_member_and_time(folder: Path, name: str | None) -> dict[float, dict[float, Path]]:
    """Return the checkpoint of each member at each time; every member has the same times.

    **Raises:** `InputError` for another layout, names that do not agree, or a missing checkpoint.
    """
    member_name, checkpoint_name = patterns(name)
    inside = _entries(folder)
    _refuse_shards(folder, inside)
    if _is_checkpoint(folder):
        raise refuse(
            "recording",
            f"{_LAYOUT}, two checkpoints or more",
            f"{folder} is a single checkpoint",
        )
    folders = [entry for entry in inside if entry.is_dir()]
    if member_name is None:
        folders = [entry for entry in folders if has_number(entry)]
    _refuse_one_level(folder, inside, folders)
    if not folders:
        raise refuse(
            "recording",
            _LAYOUT,
            f"{folder} has no folder with a number in its name{_found(inside)}",
        )
    members = numbered({folder: folders}, member_name, members=True)[folder]
    candidates = {path: _candidates(path, checkpoint_name) for path in members.values()}
    for path, found in candidates.items():
        if not found:
            raise refuse(
                "recording",
                _LAYOUT,
                f"{path} has no .npz, .safetensors or Orbax folder with a number in its name"
                + _found(_entries(path)),
            )
    if member_name is None:
        _refuse_swapped(folder, candidates)
    times = numbered(candidates, checkpoint_name)
    table = {member: times[path] for member, path in members.items()}
    first = next(iter(table))
    for member, files in table.items():
        odd = sorted(set(files) ^ set(table[first]))
        if odd:
            lacking = member if odd[0] in table[first] else first
            raise refuse(
                "recording",
                "hold every member at every time",
                f"{members[lacking]} has no checkpoint at {odd[0]:.12g}",
            )
    return table


def open_checkpoint(path: Path) -> Archive:
    """Return the arrays of one checkpoint, a file or a folder.

    **Raises:** `InputError` if it holds none that can be read.
    """
    if _is_revision(path):
        with decoding("recording", path):
            path = path.parent.parent / "snapshots" / path.read_text().strip()
    if path.is_file():
        return open_file("recording", path)
    if (path / "zarr.json").exists():
        return open_zarr("recording", path)
    if is_orbax(path):
        return open_orbax("recording", path)
    inside = _entries(path)
    items = {entry.name: entry for entry in inside if entry.is_dir() and is_orbax(entry)}
    if items:
        return _items(path, items)
    files = [entry for entry in inside if entry.is_file()]
    index = [entry for entry in files if entry.name.endswith(".safetensors.index.json")]
    readable = [entry for entry in files if entry.suffix.lower() in FILES]
    others = {
        entry.name: "a file of another format"
        for entry in files
        if entry.suffix.lower() in (*PICKLES, *_FOREIGN)
    }
    if index or any(_SHARD.fullmatch(entry.name) for entry in readable):
        return _with(_of_shards(path, index, readable), others)
    if len(readable) == 1:
        return _with(open_file("recording", readable[0]), others)
    if readable:
        stems = {entry.stem: open_file("recording", entry) for entry in readable}
        if len(stems) < len(readable):
            names = ", ".join(entry.name for entry in readable)
            raise refuse("recording", "hold each checkpoint once", f"{path} has {names}")
        return joined(path, stems, others)
    folders = [entry for entry in inside if entry.is_dir()]
    if len(folders) == 1 and _is_checkpoint(folders[0]):
        return open_checkpoint(folders[0])
    for entry in files:
        refuse_pickle("recording", entry)
    raise refuse(
        "recording",
        "hold .npz, .safetensors or Orbax checkpoints in the folders of a member",
        f"{path} is none or is incomplete{_found(inside)}",
    )


def _with(archive: Archive, others: dict[str, str]) -> Archive:
    return dataclasses.replace(archive, left_out={**archive.left_out, **others})


def _items(path: Path, items: dict[str, Path]) -> Archive:
    listed = _listed(path)
    for name in listed:
        if not (path / name).is_dir():
            raise refuse("recording", "be whole", f"{path} lacks its item `{name}`")
    others = {
        entry.name: "an item without arrays"
        for entry in _entries(path)
        if entry.is_dir() and entry.name not in items
    }
    if list(items) == ["default"]:
        return _with(open_orbax("recording", items["default"]), others)
    opened = {name: open_orbax("recording", entry) for name, entry in items.items()}
    return joined(path, opened, others)


def _listed(path: Path) -> list[str]:
    """Return the items that a checkpoint of Orbax says it has."""
    stated = path / "_CHECKPOINT_METADATA"
    if not stated.exists():
        return []
    with decoding("recording", stated):
        handlers = json.loads(stated.read_bytes()).get("item_handlers")
    return list(handlers) if isinstance(handlers, dict) else []


def _of_shards(path: Path, index: Sequence[Path], readable: Sequence[Path]) -> Archive:
    if len(index) > 1:
        names = ", ".join(entry.name for entry in index)
        raise refuse("recording", "have one index of its shards", f"{path} has {names}")
    if not index:
        return sharded("recording", path, [open_file("recording", one) for one in _all(readable)])
    with decoding("recording", index[0]):
        owners = json.loads(index[0].read_bytes())["weight_map"]
        names = sorted(set(owners.values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise refuse("recording", "hold every shard", f"{path} lacks {name!r}")
    whole = sharded("recording", path, [open_file("recording", path / name) for name in names])
    odd = sorted(set(owners) ^ set(whole.headers))
    if odd:
        raise refuse(
            "recording",
            "hold the arrays that its index names",
            f"`{odd[0]}` is in one alone of {index[0]} and its shards",
        )
    beside = [entry.name for entry in readable if entry.name not in names]
    return _with(whole, dict.fromkeys(beside, "a file that the index of the shards lacks"))


def _all(readable: Sequence[Path]) -> list[Path]:
    """The shards of a model without an index, all of them."""
    matches = [(entry, _SHARD.fullmatch(entry.name)) for entry in readable]
    kinds = {(match[1], int(match[3])) for _, match in matches if match}
    numbers = sorted(int(match[2]) for _, match in matches if match)
    stem, count = next(iter(kinds))
    if len(kinds) > 1 or len(numbers) < len(readable) or numbers != list(range(1, count + 1)):
        names = ", ".join(entry.name for entry in readable)
        raise refuse(
            "recording", f"hold every shard, {stem}-00001 to {count:05d}", f"there are {names}"
        )
    return list(readable)


# What is in a folder


def _entries(folder: Path) -> list[Path]:
    # The leftovers of an interrupted Orbax end in a number as well.
    with decoding("recording", folder):
        return sorted(
            entry
            for entry in folder.iterdir()
            if not entry.name.startswith(".") and ".orbax-checkpoint-tmp" not in entry.name
        )


def _candidates(folder: Path, name: str | None) -> list[Path]:
    """Return what may be the checkpoints of a member, in its folder or the only one below."""
    inside = _entries(folder)
    _refuse_shards(folder, inside)
    if all((folder / part).is_dir() for part in ("refs", "snapshots")):
        revisions = [entry for entry in _entries(folder / "refs") if _is_revision(entry)]
        return [entry for entry in revisions if has_number(entry)]
    found = _checkpoints(inside, name)
    if found:
        return found
    below = [(entry, _checkpoints(_entries(entry), name)) for entry in inside if entry.is_dir()]
    with_some = [candidates for _, candidates in below if candidates]
    return with_some[0] if len(with_some) == 1 else []


def _is_revision(path: Path) -> bool:
    """Return whether a file is the name of a revision in a cache of the Hub, and holds its hash."""
    beside = path.parent.parent / "snapshots"
    return path.parent.name == "refs" and path.is_file() and beside.is_dir()


def _checkpoints(entries: Iterable[Path], name: str | None) -> list[Path]:
    candidates = []
    for entry in entries:
        suffix = entry.suffix.lower()
        if not has_number(entry):
            continue
        if entry.is_dir() or suffix in FILES:
            candidates.append(entry)
        elif name is None:
            refuse_pickle("recording", entry)
            if suffix in _FOREIGN:
                raise refuse(
                    "recording",
                    "hold checkpoints that can be read (save .npz or .safetensors, or choose "
                    "others by name='step_{}')",
                    f"{entry} is of the format {suffix}",
                )
    return candidates


def _is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is one checkpoint rather than a folder of them."""
    if is_orbax(folder) or (folder / "_CHECKPOINT_METADATA").exists():
        return True
    found = [entry for entry in _entries(folder) if entry.suffix.lower() in FILES or entry.is_dir()]
    if any(has_number(entry) and not _SHARD.fullmatch(entry.name) for entry in found):
        return False
    return any(entry.is_file() or is_orbax(entry) for entry in found)


def _refuse_shards(folder: Path, inside: Iterable[Path]) -> None:
    for entry in inside:
        if _SHARD.fullmatch(entry.name):
            raise refuse(
                "recording",
                "hold each checkpoint in a folder of its own, as in member_000/checkpoint-500/",
                f"{folder} holds the shard {entry.name}",
            )


def _refuse_one_level(folder: Path, inside: Sequence[Path], folders: Sequence[Path]) -> None:
    """Reject checkpoints that are not in the folders of members, and name what to do."""
    files = [entry for entry in inside if entry.is_file() and entry.suffix.lower() in FILES]
    files = [entry for entry in files if has_number(entry)]
    single = [entry for entry in folders if _is_checkpoint(entry)]
    if not folders or len(single) == len(folders):
        flat = files or single
        if flat:
            raise refuse(
                "recording",
                f"{_LAYOUT} (Σ compares copies of a network that were trained apart; move the "
                "checkpoints of each copy into a folder of its own, or stack the copies in one "
                ".npz as `positions` (snapshots, members, numbers))",
                f"{folder} holds {len(flat)} checkpoints, such as {flat[0].name}, outside of the "
                "folder of a member",
            )


def _refuse_swapped(folder: Path, candidates: Mapping[Path, Sequence[Path]]) -> None:
    """Reject folders of times with members in them, which would be measured as the other way."""
    inside = [path for found in candidates.values() for path in found]
    if swapped(candidates, inside):
        outer, inner = next(iter(candidates)), inside[0]
        raise refuse(
            "recording",
            f"{_LAYOUT} (where the outer folders are the members, say so by name, as in "
            "'run_{}/model_{}')",
            f"{folder} has {outer.name}/{inner.name}, which reads as a member at a time",
        )


def _found(inside: Sequence[Path]) -> str:
    if not inside:
        return ""
    names = [entry.name + "/" * entry.is_dir() for entry in inside]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return f"; it holds {', '.join(names[: 3 if more else 4])}{more}"
