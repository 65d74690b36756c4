"""A miniature upstream: same layout and rules as the real one, in a few kilobytes."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PROJECT = REPO / "bindings" / "llama-cpp-python"
sys.path.insert(0, str(PROJECT))

LINES = "".join(f"line {i}\n" for i in range(1, 41))
BACKEND = """
import os
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = "llama_cpp_python-7.8.9.dist-info"
    os.makedirs(os.path.join(directory, folder))
    with open(os.path.join(directory, folder, "METADATA"), "w") as f:
        f.write("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 7.8.9\\n")
    return folder
"""
UPSTREAM = {
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n',
    "b.py": BACKEND,
    "PKG-INFO": "Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 7.8.9\n",
    "llama_cpp/__init__.py": '__version__ = "7.8.9"\n',
    "vendor/one.cpp": LINES,
    "vendor/two.cpp": LINES,
}
HEADER = "From: someone <someone@example.org>\nSubject: [PATCH] test\n\nWhy.\n"


def diff(file: str, *hunks: str) -> str:
    head = f"diff --git a/{file} b/{file}\nindex {'1' * 40}..{'2' * 40} 100644\n"
    return f"{head}--- a/{file}\n+++ b/{file}\n" + "".join(hunks)


def insert(after: int, text: str, shift: int = 0) -> str:
    """A hunk that inserts one line behind line `after` (numbered before earlier insertions)."""
    return f"@@ -{after},2 +{after + shift},3 @@\n line {after}\n+{text}\n line {after + 1}\n"


def make_sdist(path: Path, files: dict[str, str]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"llama_cpp_python-7.8.9/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Mini:
    """A repository with the real build code and a miniature pin."""

    root: Path
    sdist: Path

    @property
    def patches(self) -> Path:
        return self.root / "patches"

    def pin(self, digest: str | None = None) -> None:
        digest = digest or hashlib.sha256(self.sdist.read_bytes()).hexdigest()
        self.patches.joinpath("PIN").write_text(
            'name = "llama-cpp-python"\nversion = "7.8.9"\n'
            f'sdist = "{self.sdist.name}"\nsha256 = "{digest}"\nrevision = 4\n'
        )

    def patch(self, name: str, *diffs: str) -> Path:
        path = self.patches / name
        path.write_text(HEADER + "\n" + "".join(diffs))
        return path

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.root / "bindings" / "llama-cpp-python",
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
