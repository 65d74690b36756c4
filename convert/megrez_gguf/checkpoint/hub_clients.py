"""The two hubs' client libraries: how to fetch files with them, and what their errors mean."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HubName = Literal["huggingface", "modelscope"]
Kind = Literal["unknown", "revision", "denied", "offline", "space", "stopped"]


@dataclass(frozen=True, slots=True)
class Hub:
    """One hub, as messages call it and as its client library is used.

    `download(repository, revision, patterns)` fetches the files that match, into the client's cache
    or from there without network, and returns the folder. `files(repository, revision)` asks for
    the paths of all that the repository holds. They raise ImportError without the client, and what
    the client raises; `kind` says what that means.
    """

    title: str
    page: str
    """A repository's page, less its id."""
    extra: str
    """The extra of this package that installs the client."""
    login: str
    cache: str
    """The environment variable that moves the cache."""
    download: Callable[[str, str | None, list[str]], Path]
    files: Callable[[str, str | None], list[str]]
    kind: Callable[[Exception], Kind]


def _download_huggingface(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    # One file at a time: the client keeps finished files and discards the others when it is killed,
    # and fetches the parts of one file at once by itself.
    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=patterns, max_workers=1)
    )


def _files_huggingface(repository: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    return list(HfApi().list_repo_files(repository, revision=revision))


def _kind_huggingface(error: Exception) -> Kind:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "denied"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "unknown"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision"
    if isinstance(error, errors.HfHubHTTPError) and status in (401, 403):
        return "denied"
    return "offline" if isinstance(error, errors.LocalEntryNotFoundError) else "stopped"


def _download_modelscope(repository: str, revision: str | None, patterns: list[str]) -> Path:
    # Not the package `modelscope`, whose logger imports torch where torch is installed.
    from modelscope_hub import HubApi
    from modelscope_hub.errors import NetworkError, RequestTimeoutError

    api = HubApi()
    try:
        api = HubApi(endpoint=api.resolve_endpoint_for_read(repository))
        folder = api.download_repo(repository, "model", revision=revision, allow_patterns=patterns)
    except (NetworkError, RequestTimeoutError):
        folder = api.download_repo(repository, "model", revision=revision, local_files_only=True)
    return Path(folder)


def _files_modelscope(repository: str, revision: str | None) -> list[str]:
    from modelscope_hub import HubApi

    api = HubApi(endpoint=HubApi().resolve_endpoint_for_read(repository))
    found = api.list_repo_files(repository, "model", revision=revision, recursive=False)
    return [file.path for file in found]


def _kind_modelscope(error: Exception) -> Kind:
    from modelscope_hub import errors

    for e in chain(error):
        if isinstance(e, errors.NotExistError):
            return "unknown"
        if isinstance(e, errors.AuthenticationError | errors.PermissionDeniedError):
            return "denied"
    return "offline" if isinstance(error, errors.CacheNotFound) else "stopped"


def is_disk_full(error: BaseException) -> bool:
    # Hugging Face's Xet transport, which is not Python, raises no OSError.
    return any(
        getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(e)
        for e in chain(error)
    )


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the nearest first."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        failed = getattr(following, "failed_files", None)  # ModelScope's: one error a file
        following = next(iter(failed.values())) if failed else following.__cause__


HUBS: Mapping[HubName, Hub] = {
    "huggingface": Hub(
        "Hugging Face", "https://huggingface.co/", "hub", "hf auth login", "HF_HOME",
        _download_huggingface, _files_huggingface, _kind_huggingface,
    ),
    "modelscope": Hub(
        "ModelScope", "https://modelscope.cn/models/", "modelscope", "ms login", "MODELSCOPE_CACHE",
        _download_modelscope, _files_modelscope, _kind_modelscope,
    ),
}  # fmt: skip
