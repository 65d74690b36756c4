"""The hashes of its tensors that a GGUF carries, of the bytes as they were written."""

from __future__ import annotations

from megrez_gguf.conversion.metadata import HASHES
from megrez_gguf.errors import GGUFError
from megrez_gguf.format.reader import GGUFFile


def recorded(file: GGUFFile) -> tuple[dict[str, str], int]:
    """SHA-256 by tensor as recorded in `file`; and how many are of other types than tensors have.

    Raises GGUFError for a record that is damaged, or of other tensors.
    """
    record = file.values.get(HASHES, [])
    found: dict[str, tuple[str, str]] = {}
    for line in record if isinstance(record, list) else [record]:
        fields = line.split(" ") if isinstance(line, str) else []
        if len(fields) != 3 or fields[0] in found:
            raise GGUFError(f"{file.shards[0].path}: key {HASHES!r}: damaged at {line!r:.80}")
        found[fields[0]] = (fields[1], fields[2])
    tensors = {t.name: t for t in file.tensors}
    if found and found.keys() != tensors.keys():
        odd = min(found.keys() ^ tensors.keys())
        raise GGUFError(
            f"{file.shards[0].path}: key {HASHES!r} and the tensors disagree about {odd}"
        )
    fresh = {n: digest for n, (kind, digest) in found.items() if tensors[n].dtype == kind}
    return fresh, len(found) - len(fresh)
