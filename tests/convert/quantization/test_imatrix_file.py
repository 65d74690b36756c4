"""Files of importance matrices: llama-imatrix's GGUF and its old format, read, merged, refused."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from megrez_gguf.errors import ConfigError, GGUFError, OutputError
from megrez_gguf.quantization.imatrix import Imatrix, load, merge

POOL, DENSE = "blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight"
SUMS = np.array([[2, 4, 6], [0, 0, 0]], np.float32)
COUNTS = np.array([[2], [0]], np.float32)


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]


# A pool of two experts of five rows and three columns, a matrix, and what nothing is weighed for.
MODEL = (
    Tensor("token_embd.weight", (9, 4)),
    Tensor(DENSE, (7, 4)),
    Tensor("blk.0.attn_norm.weight", (4,)),
    Tensor("blk.1.ffn_gate_inp.weight", (2, 4)),
    Tensor(POOL, (2, 5, 3)),
)


def example(scale: float = 1, **fields: Any) -> Imatrix:
    """Of MODEL; the pool's second expert was never run."""
    sums = {POOL: SUMS * scale, DENSE: np.full((1, 4), scale, np.float32)}
    counts = {POOL: np.array([2, 0]), DENSE: np.array([4])}
    options: dict[str, Any] = {"datasets": ("一.txt", "b.txt"), "chunk_count": 3, "chunk_size": 512}
    return Imatrix(sums, counts, **(options | fields))


def write(path: Path, tensors: Mapping[str, Any], kind: str = "imatrix", **keys: Any) -> Path:
    """A file in llama-imatrix's form; a key that is None is left out."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    defaults = {"datasets": ["some.txt"], "chunk_count": 1, "chunk_size": 512}
    for key, value in (defaults | keys).items():
        if isinstance(value, list):
            writer.add_array(f"imatrix.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"imatrix.{key}", value)
        elif value is not None:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(
    entries: Sequence[tuple[str, int, Any]], chunks: int | None = None, dataset: str | None = None
) -> bytes:
    """As `llama-imatrix --output-format dat` writes names, calls and mean squares times calls."""

    def text(value: str) -> bytes:
        return struct.pack("<i", len(value.encode())) + value.encode()

    parts = [struct.pack("<i", len(entries))]
    for name, calls, values in entries:
        flat = np.asarray(values, "<f4").ravel()
        parts += [text(name), struct.pack("<ii", calls, flat.size), flat.tobytes()]
    parts += [] if chunks is None else [struct.pack("<i", chunks)]
    parts += [] if dataset is None else [text(dataset)]
    return b"".join(parts)


def equal(one: Imatrix, two: Imatrix) -> None:
    assert one.sums.keys() == two.sums.keys()
    for name, values in one.sums.items():
        np.testing.assert_array_equal(two.sums[name], values)
        assert two.sums[name].dtype == np.float32
        assert two.counts[name].tolist() == one.counts[name].tolist()
    facts = [(i.datasets, i.chunk_count, i.chunk_size) for i in (one, two)]
    assert facts[0] == facts[1]


# --- GGUF --------------------------------------------------------------------------------------


@pytest.mark.parametrize("datasets", [("一.txt", "b.txt"), ()])
def test_what_is_saved_is_loaded(datasets: tuple[str, ...], tmp_path: Path) -> None:
    saved = example(datasets=datasets)
    saved.save(tmp_path / "i.gguf")
    loaded = load(tmp_path / "i.gguf")
    equal(saved, loaded)
    assert loaded.path == tmp_path / "i.gguf"
    assert loaded.to_bytes() == saved.to_bytes() == (tmp_path / "i.gguf").read_bytes()


def test_the_saved_file_as_another_program_reads_it(tmp_path: Path) -> None:
    example().save(tmp_path / "i.gguf")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    found = {t.name: (t.shape.tolist(), t.data.ravel().tolist()) for t in reader.tensors}
    assert found == {
        f"{DENSE}.in_sum2": ([4], [1, 1, 1, 1]),
        f"{DENSE}.counts": ([1], [4]),
        f"{POOL}.in_sum2": ([3, 2], [2, 4, 6, 0, 0, 0]),
        f"{POOL}.counts": ([1, 2], [2, 0]),
    }
    assert [t.name for t in reader.tensors] == list(found)  # sorted by name, sums first
    keys = ("general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    assert [reader.fields[key].contents() for key in keys] == [
        "imatrix",
        ["一.txt", "b.txt"],
        3,
        512,
    ]


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "i.gguf"
    path.write_text("mine")
    with pytest.raises(OutputError, match=r"i\.gguf: exists"):
        example().save(path)
    assert path.read_text() == "mine"
    example().save(path, force=True)
    equal(load(path), example())


def test_reads_files_whatever_the_names(tmp_path: Path) -> None:
    tensors = {
        "blk.1.x.weight.in_sum2": SUMS,
        "blk.1.x.weight.counts": COUNTS,
        "blk.1.counts.counts": COUNTS[:1],
        "blk.1.counts.in_sum2": SUMS[:1],
    }
    found = load(write(tmp_path / "i.gguf", tensors))
    assert found.means.keys() == found.counts.keys() == {"blk.1.x.weight", "blk.1.counts"}
    assert found.means["blk.1.x.weight"].tolist() == [[1, 2, 3], [1, 1, 1]]
    assert found.counts["blk.1.x.weight"].tolist() == [2, 0]
    assert found.means["blk.1.counts"].tolist() == [[1, 2, 3]]


def test_counts_are_rounded_as_upstream_does(tmp_path: Path) -> None:
    counts = np.array([[0.5], [1.5], [2.49]], np.float32)
    tensors = {"x.in_sum2": np.ones((3, 2), np.float32), "x.counts": counts}
    assert load(write(tmp_path / "i.gguf", tensors)).counts["x"].tolist() == [1, 2, 2]


PAIR = {"x.in_sum2": SUMS, "x.counts": COUNTS}


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (PAIR, {"kind": "model"}, "not an importance matrix"),
        (PAIR, {"chunk_size": None}, "not an importance matrix"),
        (PAIR, {"chunk_count": None}, "not an importance matrix"),
        (PAIR, {"datasets": None}, "not an importance matrix"),
        (PAIR, {"datasets": "some.txt"}, "not an importance matrix"),
        (PAIR, {"datasets": [1, 2]}, "not an importance matrix"),
        (PAIR, {"chunk_size": "512"}, "not an importance matrix"),
        ({}, {}, "not an importance matrix"),
        ({"x.in_sum2": SUMS}, {}, "x.in_sum2 is no half of a pair"),
        ({"x.counts": COUNTS}, {}, "x.counts is no half of a pair"),
        (PAIR | {"x.y": SUMS}, {}, "x.y is no half of a pair"),
        (PAIR | {"x.in_sum2": SUMS.astype(np.float16)}, {}, "no half of a pair"),
        (PAIR | {"x.in_sum2": SUMS[:1]}, {}, "3 sums of 2 matrices x"),
        (PAIR | {"x.in_sum2": SUMS * np.nan}, {}, "x.in_sum2 holds numbers that are negative or"),
        (PAIR | {"x.in_sum2": SUMS + np.inf}, {}, "x.in_sum2 holds numbers that are negative or"),
        (PAIR | {"x.in_sum2": SUMS - 1}, {}, "x.in_sum2 holds numbers that are negative or"),
        (PAIR | {"x.counts": COUNTS - 1}, {}, "x.counts holds numbers that are negative or"),
        (PAIR | {"x.counts": COUNTS + np.inf}, {}, "x.counts holds numbers that are negative or"),
        (PAIR | {"x.counts": COUNTS * np.float32(1e19)}, {}, "x.counts holds .*: damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")  # zero times infinity, which is meant
def test_files_that_are_none(
    tensors: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "i.gguf", tensors, **changes)
    with pytest.raises(GGUFError, match=rf"i\.gguf: .*{message}"):
        load(path)


def test_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match=r"none\.gguf: cannot be read"):
        load(tmp_path / "none.gguf")


@pytest.mark.parametrize("content", [b"", b"\1\0\0\0" * 20, b"Guten Tag"])
def test_a_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.dat").write_bytes(content)
    with pytest.raises(GGUFError, match=r"some\.dat: not an importance matrix"):
        load(tmp_path / "some.dat")


def test_files_cut_anywhere_are_refused(tmp_path: Path) -> None:
    whole = example().to_bytes()
    path = tmp_path / "i.gguf"
    # The last tensor is two numbers, padded to 32 bytes.
    for length in range(len(whole) - 24):
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError, match=r"i\.gguf: "):
            load(path)


# --- the old format ----------------------------------------------------------------------------

ENTRIES = [(POOL, 2, SUMS + 2), (DENSE, 0, [1, 2, 3, 4])]


@pytest.mark.parametrize(
    ("chunks", "dataset", "told"),
    [(None, None, ((), 0)), (7, None, ((), 7)), (7, "", ((), 7)), (7, "一.txt", (("一.txt",), 7))],
)
def test_reads_the_old_format(
    chunks: int | None, dataset: str | None, told: tuple[Any, int], tmp_path: Path
) -> None:
    (tmp_path / "i.dat").write_bytes(legacy(ENTRIES, chunks, dataset))
    found = load(tmp_path / "i.dat")
    assert (found.datasets, found.chunk_count) == told
    # Values of no calls are taken as they are.
    assert {name: values.tolist() for name, values in found.means.items()} == {
        POOL: [[2, 3, 4, 1, 1, 1]],
        DENSE: [[1, 2, 3, 4]],
    }
    assert found.means_for(MODEL)[POOL].tolist() == [[2, 3, 4], [1, 1, 1]]
    assert found.counts == found.unseen() == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (legacy([]), ""),
        (legacy([("", 1, [1])]), ""),
        (legacy([("x", 1, [])]), "in or after 'x'"),
        (legacy([("x", -1, [1])]), "in or after 'x'"),
        (legacy([("x", 1, [1]), ("x", 1, [1])]), "in or after 'x'"),
        (legacy([("x", 1, [1])], -1), "in or after 'x'"),
        (legacy([("x", 1, [1])], 1, "a") + b"a", "in or after 'x'"),
        (legacy([("x", 1, [1]), ("y", 1, [np.nan])]), "y holds numbers that are negative or not"),
        (legacy([("x", 1, [1]), ("y", 1, [-1])]), "y holds numbers that are negative or not"),
        (legacy([("x", 1, [1]), ("y", 1, [np.inf])]), "y holds numbers that are negative or not"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_damaged_files_in_the_old_format(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(content)
    with pytest.raises(GGUFError, match=rf"i\.dat: .*{message}"):
        load(tmp_path / "i.dat")


def test_files_in_the_old_format_cut_anywhere_are_refused(tmp_path: Path) -> None:
    whole = legacy(ENTRIES, 7, "一.txt")
    complete = {len(legacy(ENTRIES)), len(legacy(ENTRIES, 7))}
    path = tmp_path / "i.dat"
    for length in set(range(len(whole))) - complete:
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError, match=r"i\.dat: not an importance matrix"):
            load(path)


# --- any content -------------------------------------------------------------------------------

NAMES = st.text("abc._漢", min_size=1, max_size=9)
NUMBERS = st.floats(0, 2.0**100, width=32)
MATRICES = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: st.tuples(
        arrays(np.float32, shape, elements=NUMBERS),
        # Float32, as which the file has them, holds no odd number above.
        arrays(np.int64, shape[0], elements=st.integers(0, 1 << 24)),
    )
)


@given(matrices=st.dictionaries(NAMES, MATRICES, min_size=1, max_size=4), data=st.data())
def test_any_matrix_survives_the_file(
    matrices: dict[str, Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    datasets = tuple(data.draw(st.lists(NAMES, max_size=3)))
    numbers = st.integers(0, (1 << 32) - 1)
    sums = {name: values for name, (values, _) in matrices.items()}
    counts = {name: count for name, (_, count) in matrices.items()}
    saved = Imatrix(sums, counts, datasets, data.draw(numbers), data.draw(numbers))
    path = tmp_path_factory.getbasetemp() / "any.gguf"
    saved.save(path, force=True)
    equal(saved, load(path))


@given(
    matrices=st.dictionaries(
        NAMES,
        st.tuples(st.integers(0, 9), arrays(np.float32, st.integers(1, 6), elements=NUMBERS)),
        min_size=1,
        max_size=4,
    ),
    chunks=st.integers(0, 1 << 30),
)
def test_any_means_in_the_old_format(
    matrices: dict[str, Any], chunks: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.dat"
    path.write_bytes(legacy([(name, *entry) for name, entry in matrices.items()], chunks, "a"))
    found = load(path)
    assert found.chunk_count == chunks
    assert found.means.keys() == matrices.keys()
    for name, (calls, values) in matrices.items():
        np.testing.assert_array_equal(found.means[name], [values / np.float32(max(calls, 1))])


WHOLE = {"gguf": example().to_bytes(), "dat": legacy(ENTRIES, 7, "一.txt")}


@pytest.mark.parametrize("kind", WHOLE)
@given(edits=st.dictionaries(st.integers(0, 700), st.integers(0, 255), min_size=1, max_size=4))
def test_damage_is_refused_or_harmless(
    kind: str, edits: dict[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray(WHOLE[kind])
    for at, byte in edits.items():
        raw[at % len(raw)] = byte
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(raw)
    with suppress(GGUFError):
        assert all(np.isfinite(mean).all() for mean in load(path).means.values())


# --- means -------------------------------------------------------------------------------------


def test_experts_no_token_reached_weigh_all_columns_alike() -> None:
    """As llama-quantize has it for a count of zero."""
    found = example()
    assert found.means[POOL].tolist() == [[1, 2, 3], [1, 1, 1]]
    assert found.means[DENSE].tolist() == [[0.25] * 4]
    assert found.unseen() == {POOL: [1]}


def test_means_are_divided_in_float32_as_llama_quantize_does() -> None:
    sums, count = np.array([[1e-3, 16777217, 3e30]], np.float32), 3
    found = Imatrix({"x": sums}, {"x": np.array([count])}).means["x"]
    assert found.dtype == np.float32
    assert found.tolist() == (sums / np.float32(count)).tolist()


@pytest.mark.parametrize(
    ("sums", "counts", "means"),
    [
        (SUMS, [2, 0], [[1, 2, 3], [1, 1, 1]]),
        # One count for all experts, as llama-imatrix makes of its old format; and the same of a
        # file that has no experts' counts at all.
        (SUMS.reshape(1, 6), [2], [[1, 2, 3], [0, 0, 0]]),
        (SUMS.reshape(1, 6), None, [[2, 4, 6], [0, 0, 0]]),
    ],
)
def test_means_are_given_in_rows_of_experts(sums: Any, counts: Any, means: Any) -> None:
    base = example()
    without = {name: count for name, count in base.counts.items() if name != POOL}
    known = {POOL: np.array(counts)} if counts else {}
    found = Imatrix({**base.sums, POOL: sums}, {**without, **known}).means_for(MODEL)
    assert found.keys() == {DENSE, POOL}
    assert found[POOL].tolist() == means
    assert found[DENSE].shape == (1, 4)


def test_a_router_may_be_there() -> None:
    """llama-imatrix has it; llama-quantize leaves routers as they are."""
    name = "blk.1.ffn_gate_inp.weight"
    found = Imatrix({**example().sums, name: np.ones((1, 4), np.float32)}, {})
    assert name in found.means_for(MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({POOL: None}, rf"it has nothing for {POOL}"),
        ({DENSE: None}, rf"it has nothing for {DENSE}"),
        ({DENSE: np.ones((1, 5))}, rf"for {DENSE} it has \(1, 5\), expected \(1, 4\)"),
        ({POOL: np.ones((3, 3))}, rf"for {POOL} it has \(3, 3\), expected \(2, 3\)"),
        ({POOL: np.ones((1, 3))}, rf"for {POOL} it has \(1, 3\), expected \(2, 3\)"),
        ({"blk.9.x.weight": np.ones((1, 3))}, "it has blk.9.x.weight, which the model lacks"),
    ],
)
def test_matrices_of_other_models(change: dict[str, Any], message: str) -> None:
    sums = {name: v for name, v in {**example().sums, **change}.items() if v is not None}
    expected = rf"i\.gguf: the importance matrix is of another model: {message}"
    with pytest.raises(ConfigError, match=expected):
        Imatrix(sums, {}, path=Path("i.gguf")).means_for(MODEL)


# --- merging -----------------------------------------------------------------------------------


def test_merging_adds_up_sums_and_counts() -> None:
    other = Imatrix(
        {POOL: SUMS[::-1], "output.weight": np.ones((1, 4), np.float32)},
        {POOL: np.array([0, 5]), "output.weight": np.array([9])},
        ("c.txt",),
        2,
        512,
    )
    parts = [example(), example(2), other]
    found = merge(parts)
    assert found.sums[POOL].tolist() == [[6, 12, 18], [2, 4, 6]]
    assert found.counts[POOL].tolist() == [4, 5]
    assert found.means[DENSE].tolist() == [[0.375] * 4]
    assert found.counts[DENSE].tolist() == [8]
    assert found.sums["output.weight"].tolist() == [[1] * 4]
    assert found.datasets == ("一.txt", "b.txt", "一.txt", "b.txt", "c.txt")
    assert (found.chunk_count, found.chunk_size) == (8, 512)
    equal(parts[0], example())  # parts are left as they were
    equal(merge(parts[:1]), parts[0])


def other_shape(path: Path) -> None:
    write(path, {f"{POOL}.in_sum2": SUMS[:, :2].copy(), f"{POOL}.counts": COUNTS})


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (example(chunk_size=128).save, r"2: chunks of 128 tokens, but .*1 has chunks of 512"),
        (other_shape, rf"2: for {POOL} it has \(2, 2\), and .*1 \(2, 3\)"),
        (lambda path: path.write_bytes(legacy(ENTRIES)), "2: in llama-imatrix's old format"),
        (example(5e37).save, rf"2: the sums of {POOL} exceed float32's range"),
        (
            example(chunk_count=(1 << 32) - 1).save,
            rf"2: with it they say to be of {(1 << 32) + 2} chunks, more than a file can tell",
        ),
    ],
)
def test_what_cannot_be_merged(second: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    example(5e37).save(tmp_path / "1")
    second(tmp_path / "2")
    with pytest.raises(ConfigError, match=message):
        merge([load(tmp_path / "1"), load(tmp_path / "2")])


def test_means_alone_cannot_be_rewritten(tmp_path: Path) -> None:
    (tmp_path / "i.dat").write_bytes(legacy(ENTRIES))
    with pytest.raises(ConfigError, match=r"i\.dat: in llama-imatrix's old format.*nor rewritten"):
        load(tmp_path / "i.dat").save(tmp_path / "i.gguf")
    assert not (tmp_path / "i.gguf").exists()
