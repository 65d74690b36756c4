"""Which files of a folder, or of a repository, hold the weights.

The index says it where there is one. Without, the names do: one file, or parts 1 to M of "NAME,
part N of M". One set named "model" goes before all others, as it does for transformers; of several
that could be meant none is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from megrez_gguf.checkpoint.documents import INDEX, Documents
from megrez_gguf.errors import CheckpointError
from megrez_gguf.text import few

SUFFIX = ".safetensors"

_PART = re.compile(r"(.+?)[-_.](\d{1,9})[-_]?of[-_]?(\d{1,9})(.*)\.safetensors", re.ASCII)
# More than any model has: the names of those that are missing are made up.
_MOST_PARTS = 10_000
# What lies beside a model and is no model.
_BESIDE = re.compile(
    r"(?:^|[-_.])(?:adapters?|lora|optim(?:izer)?|scheduler|random_states?|rng_states?)(?:[-_.]|$)",
    re.IGNORECASE,
)
# What aria2 and axel keep beside a file that has its full size from the start.
_UNFINISHED = (".aria2", ".st")
_PYTORCH = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Index:
    """What `model.safetensors.index.json` says: the shard of each tensor, and their size in all."""

    weight_map: Mapping[str, str]
    total_size: int | None

    @classmethod
    def of(cls, documents: Documents) -> Index | None:
        """The index of a checkpoint, None without one.

        Raises CheckpointError: it names no tensor, or what cannot be a shard.
        """
        if documents.index is None:
            return None
        path, entries = documents.folder / INDEX, documents.index.get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(
                f"{path}: expected an object `weight_map` naming at least one tensor"
            )
        for tensor, name in entries.items():
            # A name from a downloaded file must not reach outside the folder.
            if not isinstance(name, str) or not name.endswith(SUFFIX) or not _is_plain(name):
                raise CheckpointError(
                    f"{path}: tensor {tensor}: {name!r} is not the name of a {SUFFIX} file in "
                    "this folder"
                )
        meta = documents.index.get("metadata")
        total = meta.get("total_size") if isinstance(meta, dict) else None
        return cls(entries, total if type(total) is int else None)


def _is_plain(name: str) -> bool:
    return not any(c in name for c in "/\\\0") and name not in (".", "..")


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The files that hold a checkpoint's weights, and what to know of the choice."""

    files: tuple[str, ...]
    index: Index | None
    """None without one, or with one that is of other files."""
    notes: tuple[str, ...] = ()


def choose(where: object, present: Collection[str], index: Index | None) -> ShardSet:
    """The weights among the files `present` in `where`, a folder or a repository, for messages.

    Files that the index names and that are not present are left out: whether their tensors are
    needed is for the layout to say. Raises CheckpointError: no safetensors file, parts missing or
    still on their way, or several sets that could each be meant.
    """
    chosen = _choose(where, present, index)
    if halves := [n for n in chosen.files for e in _UNFINISHED if n + e in present]:
        raise CheckpointError(
            f"{where}: {few(halves)}: not all of it is here, as its downloader's record beside it "
            f"tells ({' or '.join(_UNFINISHED)}); let the download end first"
        )
    return chosen


def _choose(where: object, present: Collection[str], index: Index | None) -> ShardSet:
    sets = _sets(n for n in present if n.endswith(SUFFIX))
    if index is None:
        return ShardSet(_without_index(where, present, sets), None)
    wanted = sorted(set(index.weight_map.values()))
    found = tuple(n for n in wanted if n in present)
    if not found:
        if not any(s.rank == 0 and not s.missing for s in sets):
            raise CheckpointError(f"{where}: {INDEX} names {_gone(wanted, present)}")
        note = f"{INDEX} names {few(wanted)}, none of which is here; it was left out"
        return ShardSet(_without_index(where, present, sets), None, (note,))
    # Other files may lie beside a model; another set of its shards may not.
    stray = [n for s in sets if s.rank == 0 for n in s.files if n not in wanted]
    if stray:
        raise CheckpointError(
            f"{where}: {few(stray)} lies in this folder and {INDEX} does not name it; "
            "move it away if it belongs to another download"
        )
    return ShardSet(found, index)


@dataclass(frozen=True, slots=True)
class _Set:
    """Files of one name: one, or parts of `count`."""

    name: str
    count: int
    parts: Mapping[int, str]

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(name for _, name in sorted(self.parts.items()))

    @property
    def missing(self) -> list[str]:
        first = next(iter(self.parts.values()))
        if not self.count:
            return []
        match = _PART.fullmatch(first)
        assert match is not None  # it was found so
        begin, end = match.span(2)
        numbers = (f"{n:0{end - begin}}" for n in range(1, self.count + 1) if n not in self.parts)
        return [first[:begin] + number + first[end:] for number in numbers]

    @property
    def rank(self) -> int:
        if self.name == "model":
            return 0
        return 2 if _BESIDE.search(self.name) else 1

    def __str__(self) -> str:
        return self.files[0] if len(self.parts) == 1 else f"{self.files[0]} ({len(self.parts)})"


def _sets(files: Iterable[str]) -> list[_Set]:
    found: dict[tuple[str, int], dict[int, str]] = {}
    for name in sorted(files):
        match = _PART.fullmatch(name)
        if match and 1 <= int(match[2]) <= int(match[3]) <= _MOST_PARTS:
            found.setdefault((match[1] + match[4], int(match[3])), {})[int(match[2])] = name
        else:
            found[name.removesuffix(SUFFIX), 0] = {1: name}
    return [_Set(name, count, parts) for (name, count), parts in found.items()]


def _without_index(where: object, present: Collection[str], sets: list[_Set]) -> tuple[str, ...]:
    if not sets:
        raise CheckpointError(f"{where}: {_nothing(present)}")
    rank = min(s.rank for s in sets)
    candidates = [s for s in sets if s.rank == rank]
    if len(candidates) > 1:
        other = [n for n in present if n.endswith(".safetensors.index.json")]
        hint = f"; {few(other)} may be it, under another name" if other else ""
        raise CheckpointError(
            f"{where}: {few([str(s) for s in candidates])}: several {SUFFIX} files and no {INDEX} "
            f"that says which belong together{hint}; leave only the model's in this folder"
        )
    (chosen,) = candidates
    if chosen.missing:
        raise CheckpointError(
            f"{where}: {chosen.files[0]} is one of {chosen.count} parts; "
            f"{_gone(chosen.missing, present)}"
        )
    return chosen.files


def _gone(names: list[str], present: Collection[str]) -> str:
    """That the files `names` are missing, and what tells why."""
    begun = [p for p in present if any(p.startswith(n + ".") for n in names)]
    why = f": {few(begun)} was left by one that was cut short" if begun else ""
    return (
        f"{few(names)}, missing from this folder; is the download complete{why}? "
        "`hf download OWNER/NAME` fetches what is missing"
    )


def _nothing(present: Collection[str]) -> str:
    if any(n.endswith(_PYTORCH) for n in present):
        return (
            "PyTorch files only; save the model as safetensors first "
            "(model.save_pretrained(..., safe_serialization=True))"
        )
    if ggufs := sorted(n for n in present if n.endswith(".gguf")):
        return f"no {SUFFIX} file in this folder; {few(ggufs)} is converted already: give that file"
    if begun := sorted(n for n in present if f"{SUFFIX}." in n and not n.endswith(".json")):
        return (
            f"no {SUFFIX} file in this folder, and {few(begun)}, left by a download that was cut "
            "short; run it again"
        )
    return f"no {SUFFIX} file in this folder"
