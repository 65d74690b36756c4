"""Where a checkpoint lies on this machine, and the repository it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.checkpoint.hub_clients import HUBS, HubName


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
    """What the names of a hub's cache folders tell about `path`; no more than the path otherwise.

    Hugging Face's are models--OWNER--NAME/snapshots/COMMIT, ModelScope's
    models/OWNER--NAME/snapshots/REVISION.
    """
    *_, models, repository, snapshots, revision = ("", "", "", *path.resolve().parts)
    if snapshots == "snapshots":
        if match := re.fullmatch(r"models--(.+?)--(.+)", repository):
            return Location(path, "huggingface", f"{match[1]}/{match[2]}", revision)
        if models == "models" and (match := re.fullmatch(r"(.+?)--(.+)", repository)):
            return Location(path, "modelscope", f"{match[1]}/{match[2]}", revision)
    return Location(path)
