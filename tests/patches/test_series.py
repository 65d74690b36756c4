"""The real series against the real pinned source, and the tools that keep it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from megrez_llama_build import source

from support.mini import HEADER, LINES, REPO, UPSTREAM, Mini, diff, insert, make_sdist


def script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts/development" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_the_series_applies_and_exports_byte_for_byte(tmp_path: Path) -> None:
    patches, tree = tmp_path / "patches", tmp_path / "tree"
    shutil.copytree(source.PATCHES, patches)
    done = script("patches", "--patches", patches, "check")
    assert done.returncode == 0, done.stderr
    assert script("patches", "--patches", patches, "tree", tree).returncode == 0
    done = script("patches", "--patches", patches, "export", tree)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert contents(patches) == contents(source.PATCHES)


def test_the_amx_patch_mends_what_is_broken_without_it(tmp_path: Path) -> None:
    done = script("check_amx")
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    if "before" in done.stdout.partition("NO")[0]:  # this compiler has the defect
        shutil.copytree(source.PATCHES, tmp_path / "patches")
        next((tmp_path / "patches").glob("*-amx-*.patch")).unlink()
        assert script("check_amx", "--patches", tmp_path / "patches").returncode == 1


def test_the_pin_is_the_only_place_that_names_the_release() -> None:
    pin = source.Pin.load()
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True
    )
    places = []
    for name in filter(None, listed.stdout.split("\0")):
        path = REPO / name
        if name == "patches/PIN" or not path.is_file() or path.stat().st_size > 1 << 20:
            continue
        # What was true of a release stays true: history and published figures may name it.
        published = rb"(?s)<!-- (results|figures):begin.*?<!-- \1:end -->"
        text = re.sub(published, b"", path.read_bytes())
        if pin.version.encode() in text or pin.sha256.encode() in text:
            places.append(name)
    assert [p for p in places if p != "CHANGELOG.md"] == []


def test_every_patch_and_overlay_file_is_explained() -> None:
    text = (source.PATCHES / "README.md").read_text("utf-8")
    for patch in source.patch_files():
        assert f"`{patch.name}`" in text
        head = patch.read_text("utf-8").partition("\ndiff --git ")[0]
        assert head.startswith("From: megrez-gguf <megrez-gguf@users.noreply.github.com>\n")
        assert "\nSubject: [PATCH] " in head
        assert "etire" in head, f"{patch.name} does not say what retires it"
        assert "\nProposal: " in head, f"{patch.name} does not say how it is proposed upstream"
    for name in source.overlay_files():
        assert name.rpartition(".")[0] in text


def test_check_reports_conflicts_and_exits_1(mini: Mini) -> None:
    mini.patch("0001-one.patch", diff("vendor/one.cpp", insert(5, "A").replace("6", "six")))
    mini.patch("0002-two.patch", diff("vendor/two.cpp", insert(9, "C").replace("10", "ten")))
    done = mini.run(str(mini.root / "scripts/development/patches"), "check")
    assert done.returncode == 1
    assert "0001-one.patch: vendor/one.cpp, hunk 1" in done.stderr
    assert "0002-two.patch: vendor/two.cpp, hunk 1" in done.stderr


def patches(mini: Mini, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return mini.run(str(mini.root / "scripts/development/patches"), *map(str, arguments))


def git(tree: Path, *arguments: str) -> str:
    """git as a developer would use it, with whatever he configured."""
    env = {**os.environ, "GIT_SEQUENCE_EDITOR": "true", "GIT_EDITOR": "true"}
    command = ["git", "-c", "commit.gpgSign=false", *arguments]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fix(tree: Path, patch: str) -> None:
    """Put all edits into the commit of `patch`."""
    # Commits that earlier edits have replaced keep their notes, and are no longer to be amended.
    commits = git(tree, "rev-list", "upstream..HEAD").split()
    commit = next(c for c in commits if git(tree, "notes", "show", c).strip() == patch)
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", f"fixup! {commit}")
    git(tree, "rebase", "-q", "-i", "--autosquash", "upstream")


def test_edits_go_to_the_patch_of_their_commit(mini: Mini, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    mini.patch("0003-more.patch", diff("vendor/one.cpp", insert(30, "D").replace("-30", "-32")))
    assert patches(mini, "tree", tree).returncode == 0
    assert patches(mini, "export", tree).returncode == 0  # now in canonical form
    settled = contents(mini.patches)
    (tree / "vendor/two.cpp").write_text((tree / "vendor/two.cpp").read_text() + "end\n")
    fix(tree, "0002-two.patch")
    one = (tree / "vendor/one.cpp").read_text()
    (tree / "vendor/one.cpp").write_text(one.replace("line 40\n", "line 40\nE\n"))
    (tree / "vendor/brand.cpp").write_text("brand new\n")
    fix(tree, "0003-more.patch")
    done = patches(mini, "export", tree)
    assert done.stdout.split() == ["overlay/vendor/brand.cpp", "0002-two.patch", "0003-more.patch"]
    now = contents(mini.patches)
    assert now["0001-one.patch"] == settled["0001-one.patch"]
    assert b"+end" in now["0002-two.patch"]
    assert b"+E" in now["0003-more.patch"]
    assert now["0002-two.patch"].startswith(HEADER.encode())
    assert patches(mini, "check").returncode == 0
    again = patches(mini, "export", tree)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr


def test_an_edit_nobody_owns_needs_a_patch(mini: Mini, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    patches(mini, "tree", tree)
    (tree / "b.py").write_text(UPSTREAM["b.py"] + "# edited\n")
    done = patches(mini, "export", tree)
    assert done.returncode == 2
    assert "in no patch: b.py" in done.stderr
    git(tree, "commit", "-qam", "edit : b")
    done = patches(mini, "export", tree)
    assert "needs a message" in done.stderr
    git(tree, "commit", "-q", "--amend", "-m", "edit : b\n\nWhy.")
    done = patches(mini, "export", tree)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "0003-edit-b.patch"
    assert patches(mini, "check").stdout.startswith("3 patches and 1 overlay files")


def test_a_patch_whose_commit_is_gone_is_removed(mini: Mini, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    patches(mini, "tree", tree)
    git(tree, "reset", "-q", "--hard", "HEAD~1")
    done = patches(mini, "export", tree)
    assert "0002-two.patch removed" in done.stdout
    assert not (mini.patches / "0002-two.patch").exists()
    assert patches(mini, "check").stdout.startswith("1 patches and 1 overlay files")


def test_a_stale_tree_cannot_undo_newer_patches(mini: Mini, tmp_path: Path) -> None:
    patches(mini, "tree", tmp_path / "tree")
    (mini.patches / "overlay/vendor/new.cpp").write_text("newer\n")
    done = patches(mini, "export", tmp_path / "tree")
    assert done.returncode == 2
    assert "has changed since" in done.stderr
    assert (mini.patches / "overlay/vendor/new.cpp").read_text() == "newer\n"


@pytest.mark.parametrize("breaks", [False, True])
def test_bump_relocates_or_lists_what_breaks(mini: Mini, breaks: bool) -> None:
    upstream = {name: text.replace("7.8.9", "8.0.0") for name, text in UPSTREAM.items()}
    upstream["vendor/one.cpp"] = "a new first line\n" + LINES
    if breaks:
        upstream["vendor/two.cpp"] = LINES.replace("line 9\n", "line nine\n")
    newer = mini.sdist.with_name("newer.tar.gz")
    digest = make_sdist(newer, upstream)
    before = contents(mini.patches)
    command = [str(mini.root / "scripts/development/patches"), "bump", "8.0.0"]
    done = mini.run(*command, MEGREZ_LLAMA_SDIST=str(newer))
    assert done.returncode == int(breaks), done.stderr
    assert "0001-one.patch: vendor/one.cpp, hunk 1: its lines moved from 5 to 6" in done.stdout
    assert ("0002-two.patch" in done.stdout) == breaks
    done = mini.run(*command, "--write", MEGREZ_LLAMA_SDIST=str(newer))
    after = contents(mini.patches)
    if breaks:
        assert done.returncode == 1
        assert after == before
        return
    assert done.returncode == 0, done.stderr
    pin = source.Pin.load(mini.patches)
    assert (pin.version, pin.sha256, pin.revision) == ("8.0.0", digest, 1)
    done = mini.run(*command[:1], "check", MEGREZ_LLAMA_SDIST=str(newer))
    assert done.returncode == 0, done.stderr
