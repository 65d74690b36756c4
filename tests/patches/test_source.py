"""Fetching, verifying, unpacking and patching, on a miniature upstream."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from megrez_llama_build import source

from support.mini import LINES, UPSTREAM, Mini, diff, insert, make_sdist


def test_tree_has_overlay_patches_version_and_marker(mini: Mini, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    assert source.tree(tree, mini.patches)
    assert (tree / "vendor/new.cpp").read_text() == "new\n"
    one = LINES.replace("line 5\n", "line 5\nA\n").replace("line 20\n", "line 20\nB\n")
    assert (tree / "vendor/one.cpp").read_text() == one
    assert (tree / "llama_cpp/__init__.py").read_text() == '__version__ = "7.8.9+megrez.4"\n'
    marker = json.loads((tree / "llama_cpp/_megrez.json").read_text())
    assert marker["arch"] == "megrez-moe"
    assert marker["version"] == "7.8.9+megrez.4"
    assert set(marker["patches"]) == {"0001-one.patch", "0002-two.patch"}


def test_tree_is_idempotent_and_incremental(mini: Mini, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    source.tree(tree, mini.patches)
    stamps = {p: p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}
    assert not source.tree(tree, mini.patches)
    assert stamps == {p: p.stat().st_mtime_ns for p in tree.rglob("*") if p.is_file()}
    mini.patch("0002-two.patch", diff("vendor/two.cpp", insert(9, "changed")))
    (tree / "vendor/stale.cpp").write_text("left over")
    assert source.tree(tree, mini.patches)
    changed = {p.name for p, t in stamps.items() if p.stat().st_mtime_ns != t}
    assert changed == {"two.cpp", "_megrez.json"}
    assert not (tree / "vendor/stale.cpp").exists()


def test_tree_survives_an_interrupted_update(
    mini: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree"
    source.tree(tree, mini.patches)
    mini.patch("0002-two.patch", diff("vendor/two.cpp", insert(9, "changed")))
    with monkeypatch.context() as patch:
        patch.setattr(source, "_sync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            source.tree(tree, mini.patches)
    assert source.tree(tree, mini.patches)
    assert "changed" in (tree / "vendor/two.cpp").read_text()


def test_tree_leaves_a_foreign_folder_alone(mini: Mini, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(source.SourceError, match="not a patched source tree"):
        source.tree(tmp_path, mini.patches)


def test_wrong_hash_names_expected_found_origin_and_remedy(mini: Mini) -> None:
    found = source.sha256_of(mini.sdist)
    mini.pin("0" * 64)
    with pytest.raises(source.SourceError) as error:
        source.fetch_sdist(source.Pin.load(mini.patches))
    for part in ("0" * 64, found, str(mini.sdist), "MEGREZ_LLAMA_SDIST", "Remedy"):
        assert part in str(error.value)


def index(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pip see the miniature sdist, and nothing else."""
    monkeypatch.delenv("MEGREZ_LLAMA_SDIST")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(mini.sdist.parent))


def test_download_comes_from_the_configured_index_and_is_cached(
    mini: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(mini, monkeypatch)
    pin = source.Pin.load(mini.patches)
    path = source.fetch_sdist(pin)
    assert path == source.cache_root() / "sdists" / pin.sha256 / pin.sdist
    mini.sdist.unlink()
    assert source.fetch_sdist(pin) == path
    path.write_bytes(b"damaged in the cache")
    with pytest.raises(source.SourceError, match="could not download"):
        source.fetch_sdist(pin)


def test_a_download_with_another_hash_is_refused(
    mini: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(mini, monkeypatch)
    make_sdist(mini.sdist, {**UPSTREAM, "b.py": "raise SystemExit('ran unverified code')"})
    found = source.sha256_of(mini.sdist)
    with pytest.raises(source.SourceError) as error:
        source.fetch_sdist(source.Pin.load(mini.patches))
    for part in ("wrong hash", source.Pin.load(mini.patches).sha256, found, mini.sdist.name):
        assert part in str(error.value)


def evil(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 4 if kind == tarfile.REGTYPE else 0
    return member


@pytest.mark.parametrize("filters", [True, False], ids=["3.11.4", "3.11.2"])
@pytest.mark.parametrize(
    "member",
    [
        evil("top/../../outside.txt"),
        evil("top//outside.txt/../../../outside.txt"),
        evil("top/link", tarfile.SYMTYPE, "../../outside.txt"),
        evil("top/link", tarfile.LNKTYPE, "top/../../outside.txt"),
        evil("top/device", tarfile.FIFOTYPE),
    ],
    ids=lambda member: f"{member.name} {member.linkname}",
)
def test_archive_members_cannot_leave_the_folder(
    member: tarfile.TarInfo, filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as archive:
        archive.addfile(member, io.BytesIO(b"evil") if member.size else None)
    with pytest.raises(source.SourceError, match="cannot be unpacked"):
        source.unpack(tmp_path / "evil.tar.gz", tmp_path / "in" / "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["evil.tar.gz", "in", "folder"]


@pytest.mark.parametrize("filters", [True, False], ids=["3.11.4", "3.11.2"])
def test_links_within_the_archive_are_kept(
    filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with tarfile.open(tmp_path / "good.tar.gz", "w:gz") as archive:
        archive.addfile(evil("top/a/file"), io.BytesIO(b"good"))
        archive.addfile(evil("top/b/link", tarfile.SYMTYPE, "../a/file"))
        archive.addfile(evil("top/hard", tarfile.LNKTYPE, "top/a/file"))
    source.unpack(tmp_path / "good.tar.gz", tmp_path / "tree")
    for name in ("a/file", "b/link", "hard"):
        assert (tmp_path / "tree" / name).read_bytes() == b"good"


def conflicts(mini: Mini) -> list[source.Conflict]:
    with (
        source.pristine(source.Pin.load(mini.patches)) as root,
        pytest.raises(source.ConflictError) as error,
    ):
        source.apply(root, mini.patches)
    return error.value.conflicts


def test_every_conflict_is_reported_with_patch_file_hunk_and_remedy(mini: Mini) -> None:
    lost = "@@ -20,2 +21,3 @@\n line 20\n+B\n line twenty-one\n"
    mini.patch("0001-one.patch", diff("vendor/one.cpp", insert(5, "A"), lost))
    moved = insert(9, "C").replace("@@ -9,2 +9,3 @@", "@@ -11,2 +11,3 @@")
    mini.patch("0002-two.patch", diff("vendor/two.cpp", moved))
    mini.patch("0003-gone.patch", diff("vendor/gone.cpp", insert(1, "D")))
    (mini.patches / "overlay/vendor/two.cpp").write_text("clash")
    found = {(c.patch, c.file, c.hunk) for c in conflicts(mini)}
    assert found == {
        ("overlay", "vendor/two.cpp", 0),
        ("0001-one.patch", "vendor/one.cpp", 2),
        ("0002-two.patch", "vendor/two.cpp", 1),
        ("0003-gone.patch", "vendor/gone.cpp", 0),
    }
    text = "\n".join(map(str, conflicts(mini)))
    assert "0001-one.patch: vendor/one.cpp, hunk 2: line 21 should be 'line twenty-one'" in text
    assert "moved from 11 to 9" in text
    assert text.count("Remedy: ") == 4


def test_a_change_upstream_already_has_is_a_conflict(mini: Mini) -> None:
    merged = UPSTREAM["vendor/two.cpp"].replace("line 9\n", "line 9\nC\n")
    make_sdist(mini.sdist, {**UPSTREAM, "vendor/two.cpp": merged})
    mini.pin()
    (only,) = conflicts(mini)
    assert (only.patch, only.reason) == ("0002-two.patch", "the change is there already")


def test_a_patch_may_not_create_files(mini: Mini) -> None:
    body = "diff --git a/n.cpp b/n.cpp\nnew file mode 100644\n--- /dev/null\n+++ b/n.cpp\n"
    mini.patch("0003-new.patch", body + "@@ -0,0 +1 @@\n+x\n")
    with pytest.raises(source.SourceError, match=r"0003-new.patch: n.cpp: .*overlay"):
        source.touched(mini.patches)


def test_a_damaged_patch_is_refused(mini: Mini) -> None:
    path = mini.patches / "0002-two.patch"
    path.write_text(path.read_text().replace(" line 10\n", ""))
    with pytest.raises(source.SourceError, match=r"0002-two\.patch: not a well-formed patch"):
        source.touched(mini.patches)


def test_a_copy_without_the_repository_says_so(tmp_path: Path) -> None:
    with pytest.raises(source.SourceError, match="Clone the repository"):
        source.Pin.load(tmp_path)
