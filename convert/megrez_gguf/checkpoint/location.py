"""Where a checkpoint lies on this machine, and the repository it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.checkpoint.documents import CONFIG
from megrez_gguf.checkpoint.hub_clients import HUBS, HubName
from megrez_gguf.errors import SourceError
from megrez_gguf.text import few

_MODEL = re.compile(r"(?:models--)?([^/]+?)--([^/]+)")


@dataclass(frozen=True, slots=True)
class Location:
    """A checkpoint folder (or GGUF file) on this machine, and where it came from if that is known.

    `revision` is the commit's hash on Hugging Face. ModelScope's client does not tell it, so there
    it is what was asked for: a commit, a tag, or a branch ("master" unless asked for).
    """

    path: Path
    hub: HubName | None = None
    repository: str | None = None
    revision: str | None = None

    @property
    def url(self) -> str | None:
        """The repository's page."""
        return HUBS[self.hub].page + str(self.repository) if self.hub else None


def origin(path: Path) -> Location:
    """What `path` means, and what the names of a hub's cache folders tell about it.

    Hugging Face's are models--OWNER--NAME/snapshots/COMMIT, ModelScope's
    models/OWNER--NAME/snapshots/REVISION; one of a repository as a whole stands for the snapshot
    of its main branch, or for the only one. Raises SourceError: a repository of which no or several
    snapshots are here, a whole cache, or a file of a checkpoint instead of its folder.
    """
    if path.is_file() and path.suffix in (".safetensors", ".json"):
        raise SourceError(f"{path}: not a folder; give the folder it lies in, {path.parent}")
    path = _snapshot(path)
    *_, models, repository, snapshots, revision = ("", "", "", *path.resolve().parts)
    if snapshots == "snapshots" and (match := _MODEL.fullmatch(repository)):
        name = f"{match[1]}/{match[2]}"
        if repository.startswith("models--"):
            return Location(path, "huggingface", name, revision)
        if models == "models":
            return Location(path, "modelscope", name, revision)
    return Location(path)


def _snapshot(path: Path) -> Path:
    """The folder of files that a folder of a hub's cache stands for; any other path as it is."""
    folder = path.resolve()
    if not folder.is_dir() or (folder / CONFIG).exists():
        return path
    repository = folder.parent if folder.name == "snapshots" else folder
    try:
        if _MODEL.fullmatch(repository.name) and (repository / "snapshots").is_dir():
            return _chosen(path, repository)
        cached = sorted(
            p
            for pattern in ("models--*--*", "hub/models--*--*", "models/*--*", "hub/models/*--*")
            for p in folder.glob(f"{pattern}/snapshots")
        )
    except OSError as e:
        raise SourceError(f"{path}: cannot be listed: {e.strerror}") from None
    if cached:
        raise SourceError(
            f"{path}: a hub's cache; give one of the repositories in it: "
            f"{few([str(p.parent) for p in cached])}"
        )
    return path


def _chosen(path: Path, repository: Path) -> Path:
    present = sorted(p for p in (repository / "snapshots").iterdir() if p.is_dir())
    main = repository / "refs" / "main"
    if main.is_file():
        named = main.read_text(encoding="utf-8", errors="replace").strip()
        if chosen := [p for p in present if p.name == named]:
            return chosen[0]
    if len(present) == 1:
        return present[0]
    if not present:
        raise SourceError(
            f"{path}: a hub's cache folder without a snapshot: the download did not get that far"
        )
    raise SourceError(
        f"{path}: a hub's cache folder with {len(present)} snapshots; give one of them: "
        f"{few([str(p) for p in present])}"
    )
