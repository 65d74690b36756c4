"""Opening files that came from elsewhere, and saying what else they are when they are not."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megrez_gguf.storage.shard import Shard
from megrez_llama.errors import MegrezError

_HEAD = 4096

AGAIN = "download it again (`hf download OWNER/NAME`, or `git lfs pull` in a clone)"
# How the first bytes of what is often found in place of a file begin, what it is, what to do.
_MISTAKEN: tuple[tuple[tuple[bytes, ...], str], ...] = (
    (
        (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"),
        "a Git LFS pointer, which stands for the file in a clone made without Git LFS; run `git "
        "lfs install` and `git lfs pull` in its folder, or `hf download OWNER/NAME`",
    ),
    (
        (b"/annex/objects/", b".git/annex/objects/"),
        "a git-annex pointer, not the file itself; run `git annex get` in its folder",
    ),
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"),
        "a web page, not the file: the address was that of a page, or a login was asked for; "
        + AGAIN,
    ),
    (
        (b"entry not found", b"repository not found", b"invalid username or password",
         b"access to model ", b"invalid credentials", b"unauthorized", b"404: not found"),
        "a server's refusal, saved in place of the file; log in (`hf auth login`), and " + AGAIN,
    ),
    ((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zxz\0", b"bzh", b"7z\xbc\xaf\x27\x1c"),
     "a compressed file; unpack it first"),
    ((b"pk\3\4",), "a ZIP archive, or a PyTorch file, which is one; unpack it, or save the model "
     "as safetensors"),
    ((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"),
     "a Python pickle, which may run code and is not read; save the model as safetensors"),
)  # fmt: skip


@contextmanager
def opened(path: Path, error: type[MegrezError]) -> Iterator[tuple[BinaryIO, Shard]]:
    """The file `path` at its beginning, and what it looks like now.

    Raises `error`: it cannot be read, now or while it is open, or is no regular file. An `error`
    that is raised while it is open tells instead what the file is, where `mistaken` knows.
    """
    try:
        # A pipe would be waited for when it is opened.
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: not a regular file")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            head = file.read(_HEAD)
            file.seek(0)
            try:
                yield file, Shard.of(path, status)
            except error:
                # Only now: sound files may begin so too.
                if what := mistaken(head):
                    raise error(f"{path}: {what}") from None
                raise
    except OSError as e:
        if path.is_symlink() and not path.exists():
            raise error(
                f"{path}: a link to {path.readlink()}, which is not there: a download that did not "
                f"get that far, or a cache that was moved or cleared; {AGAIN}"
            ) from None
        raise error(f"{path}: cannot be read: {e.strerror or e}") from None


def mistaken(head: bytes) -> str | None:
    """What a file that begins with `head` is, in place of a model's; None where nothing tells."""
    if not head:
        return f"empty: the download or the copy did not get that far; {AGAIN}"
    if len(head) >= 64 and not any(head):
        return f"begins with zeros: space was set aside for a download that never came; {AGAIN}"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    return next((what for starts, what in _MISTAKEN if start.startswith(starts)), None)
