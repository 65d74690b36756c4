"""Models in less memory than they need: what is chosen, what is refused, what is told."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megrez_gguf import convert
from megrez_gguf.errors import GGUFError
from megrez_gguf.format.reader import GGUFFile
from megrez_llama.expert_store import compute_bytes, resize
from megrez_runtime import expert_stats, load
from megrez_runtime.bench import bench
from megrez_runtime.errors import DecodeError, MemoryBudgetError
from megrez_runtime.memory import Needs, batch_for
from support.commands import chat
from support.marks import loop_takes
from support.paths import POCKET
from support.random_checkpoint import make_checkpoint
from support.shared import Shared

MIB = 1 << 20


@pytest.fixture(scope="module")
def pocket(shared: Shared) -> Path:
    return shared.pocket("q4_0")


def needs_of(path: Path) -> Needs:
    return Needs.of(GGUFFile.open(path), path)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """free(bytes) makes the machine have so much available memory."""

    def free(nbytes: int | None) -> None:
        monkeypatch.setattr("megrez_runtime.memory.available_memory", lambda: nbytes)

    return free


def logits(llm: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    llm.reset()
    llm.eval(tokens)
    pointer = llm._ctx.get_logits_ith(-1)
    return np.ctypeslib.as_array(pointer, (llm.n_vocab(),)).copy()


TOKENS = list(range(100, 130))


@pytest.mark.parametrize("name", loop_takes("pocket".__eq__, ["pocket", "large"]))
def test_sizes_are_those_of_the_store(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    needs = needs_of(path)
    llm = load(path, n_ctx=256, expert_cache=needs.n_experts * needs.slot_bytes)
    found = expert_stats(llm)
    assert found is not None
    assert (found.slot_bytes, found.experts) == (needs.slot_bytes, needs.n_experts)
    assert found.slots == found.experts
    assert needs.expert_bytes + needs.other_bytes == sum(
        t.nbytes for t in GGUFFile.open(path).tensors
    )
    llm.close()


def test_an_expert_cache_changes_speed_and_nothing_else(pocket: Path) -> None:
    with_all = load(pocket, ram="off")
    assert expert_stats(with_all) is None
    expected = logits(with_all, TOKENS)
    for cache in (needs_of(pocket).slot_bytes * 16, "1.5MiB", 10**9):
        told: list[str] = []
        llm = load(pocket, expert_cache=cache, say=told.append)
        np.testing.assert_array_equal(logits(llm, TOKENS), expected)
        found = expert_stats(llm)
        assert found is not None
        assert found.misses > 0
        assert found.wasted == 0
        assert re.fullmatch(r"expert cache: .* for experts, \d+ of 32; the others .*", told[0])
        llm.close()
    with_all.close()


def test_small_caches_mean_small_batches(pocket: Path) -> None:
    slot = needs_of(pocket).slot_bytes
    for slots, n_ubatch in ((4, 1), (8, 2), (15, 2), (16, 512)):
        llm = load(pocket, expert_cache=slots * slot)
        assert llm.context_params.n_ubatch == n_ubatch
        assert np.isfinite(logits(llm, TOKENS)).all()
        llm.close()


def test_too_little_is_refused_with_the_least(pocket: Path) -> None:
    slot = needs_of(pocket).slot_bytes
    with pytest.raises(MemoryBudgetError, match=rf"at least {4 * slot} bytes are needed"):
        load(pocket, expert_cache=4 * slot - 1)
    with pytest.raises(MemoryBudgetError, match=rf"make it {16 * slot} bytes, or n_ubatch 3"):
        load(pocket, expert_cache=15 * slot, n_ubatch=64)
    with pytest.raises(MemoryBudgetError, match="1 MiB are too little: ") as refused:
        load(pocket, n_ctx=256, ram="1MiB")
    named = re.search(r"at least (\d+) MiB", str(refused.value))
    assert named
    assert int(named[1]) == pytest.approx(needs_of(pocket).least(256) / MIB, abs=5)
    with pytest.raises(ValueError, match="expected a size"):
        load(pocket, ram="much")
    with pytest.raises(ValueError, match="expected a size"):
        load(pocket, expert_cache="some")


@pytest.mark.slow
def test_the_least_that_is_named_is_enough(large: Path) -> None:
    """In a process of its own: this one is larger already."""
    code = (
        "import sys, re; from megrez_runtime import load, expert_stats; from pathlib import Path\n"
        "from megrez_runtime.errors import MemoryBudgetError\n"
        "try: load(sys.argv[1], n_ctx=256, ram=1 << 20)\n"
        "except MemoryBudgetError as e: least = int(re.search(r'at least (\\d+) MiB', str(e))[1])\n"
        "llm = load(sys.argv[1], n_ctx=256, ram=least << 20); llm.eval(list(range(20)))\n"
        "assert expert_stats(llm).slots >= 4\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "assert int(peak) >> 10 <= least, (peak, least)\n"
    )
    subprocess.run([sys.executable, "-c", code, large], check=True, timeout=120)


def test_automatic_choice(pocket: Path, free: Callable[[int | None], None]) -> None:
    needs = needs_of(pocket)
    told: list[str] = []
    for available in (None, 1 << 40):
        free(available)
        llm = load(pocket, say=told.append)
        assert expert_stats(llm) is None
        llm.close()
    assert not told
    # too little for anything, and said so
    free(needs.other_bytes)
    with pytest.raises(MemoryBudgetError, match="are too little"):
        load(pocket)
    load(pocket, ram="off").close()


@pytest.mark.slow
@pytest.mark.parametrize("others", [0, 700 * MIB])
def test_automatic_choice_keeps_experts_in_the_file(
    large: Path, free: Callable[[int | None], None], others: int
) -> None:
    """However much the process has in memory already."""
    used = np.ones(others, np.uint8)
    needs = needs_of(large)
    free(needs.other_bytes + 200 * MIB)
    told: list[str] = []
    llm = load(large, n_ctx=256, say=told.append)
    found = expert_stats(llm)
    assert found is not None
    assert needs.n_used <= found.slots < found.experts
    assert re.fullmatch(
        rf".* of memory are free: \d+ MiB for experts, {found.slots} of {found.experts}; .*",
        told[0],
    )
    llm.close()
    del used


@pytest.mark.slow
def test_batches_shrink_with_memory(large: Path) -> None:
    needs = needs_of(large)
    least = needs.least(256)  # with all that this process has in memory already
    sizes = [batch_for(needs, ram, 256) for ram in range(least, least + (2 << 30), 8 * MIB)]
    assert sizes[0] == 1
    assert sizes[-1] == 512
    assert sizes == sorted(sizes)
    with pytest.raises(MemoryBudgetError):
        batch_for(needs, least - 1, 256)


@pytest.mark.parametrize("all_logits", [False, True])
def test_estimates_agree_with_what_is_reserved(tmp_path: Path, all_logits: bool) -> None:
    """Of a model so narrow that logits, where all are wanted, are what takes most."""
    config = json.loads((POCKET / "config.json").read_text()) | {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    make_checkpoint(config, tmp_path / "checkpoint")
    path = tmp_path / "narrow.gguf"
    convert(tmp_path / "checkpoint", path, outtype="f16")
    needs = Needs.of(GGUFFile.open(path), path, all_logits=all_logits)
    for n_ctx in (256, 4096):
        for n_ubatch in (8, 64, 512):
            llm = load(
                path, expert_cache=1 << 30, logits_all=all_logits, n_ctx=n_ctx, n_ubatch=n_ubatch
            )
            cache = needs.working(n_ctx, 0)
            estimate = needs.working(n_ctx, n_ubatch) - cache - needs.scratch(min(n_ubatch, n_ctx))
            assert estimate == pytest.approx(compute_bytes(llm), rel=0.25)
            assert np.isfinite(logits(llm, TOKENS)).all()
            llm.close()


def test_a_store_can_be_resized(pocket: Path) -> None:
    slot = needs_of(pocket).slot_bytes
    llm = load(pocket, expert_cache=32 * slot)
    expected = logits(llm, TOKENS)
    assert resize(llm, 16 * slot, 512)
    assert not resize(llm, 16 * slot - 1, 512)
    np.testing.assert_array_equal(logits(llm, TOKENS), expected)
    found = expert_stats(llm)
    assert found is not None
    assert found.slots == 16
    assert resize(llm, 1 << 40, 512)
    np.testing.assert_array_equal(logits(llm, TOKENS), expected)
    llm.close()


def test_a_header_without_sizes_is_refused(pocket: Path, tmp_path: Path) -> None:
    raw = pocket.read_bytes()
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(raw.replace(b"megrez-moe.expert_used_count", b"megrez-moe.expert_used_c0unt"))
    with pytest.raises(GGUFError, match=r"expert_used_count is None; expected a positive integer"):
        load(bad, ram="1GiB")


def test_a_decode_that_cannot_read_fails(pocket: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(pocket.read_bytes())
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.01):
            os.utime(copy)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(DecodeError, match="the model's file has changed since it was loaded"):
            bench(copy, n_prompt=0, n_decode=200, expert_cache=4 * needs_of(copy).slot_bytes)
    finally:
        stop.set()
        thread.join()


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "megrez_cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)


def test_chat_answers_alike_and_tells_what_the_cache_did(pocket: Path) -> None:
    question = ("-p", "What is the capital of France?", "--temp", "0", "--max-tokens", "24")
    plain = chat(pocket, *question, "--stats")
    cached = chat(pocket, *question, "--stats", "--expert-cache", "1MiB")
    assert plain.stdout == cached.stdout != b""
    assert "[experts: all in memory]" in plain.stderr.decode()
    told = cached.stderr.decode()
    assert "expert cache: 1020 KiB for experts, 17 of 32" in told
    assert re.search(
        r"\[experts: \d+\.\d% of \d+ in memory, .* read, waited .* s, 0 wasted\]", told
    )
    assert "experts" not in chat(pocket, *question, "--ram", "off").stderr.decode()
    refused = chat(pocket, *question, "--expert-cache", "1K")
    assert refused.returncode == 2
    assert "bytes are needed" in refused.stderr.decode()


def test_more_logits_than_there_is_memory_for_are_refused(pocket: Path) -> None:
    """In a batch made by hand: llama.cpp would end the process."""
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (3, {"n_outputs_max": 3})]
    for wanted, options in cases:
        llm = load(pocket, expert_cache="1MiB", **options)
        for count in (wanted, wanted + 1):
            llm._ctx.kv_cache_clear()
            llm._batch.set_batch(batch=TOKENS[:8], n_past=0, logits_all=False)
            for i in range(count):
                llm._batch.batch.logits[7 - i] = 1
            if count == wanted:
                llm._ctx.decode(llm._batch)
            else:
                with pytest.raises(RuntimeError, match="-1"):
                    llm._ctx.decode(llm._batch)
        llm.close()


def test_speculative_decoding_says_the_same(pocket: Path) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    said = set()
    for cache in (None, "1MiB"):
        for draft in (None, LlamaPromptLookupDecoding(num_pred_tokens=5)):
            llm = load(pocket, n_ctx=512, expert_cache=cache, draft_model=draft)
            prompt = "The capital of France is the capital of France is"
            answer: Any = llm.create_completion(prompt, max_tokens=40, temperature=0)
            said.add(answer["choices"][0]["text"])
            found = expert_stats(llm)
            assert (found is None) == (cache is None)
            assert found is None or found.wasted == 0
            llm.close()
    assert len(said) == 1


@pytest.mark.slow
def test_bench_prints_speeds_or_json(pocket: Path) -> None:
    size = ("--prompt", "32", "--tokens", "8", "--warmup", "2", "--repeats", "2")
    text = command("bench", pocket, *size)
    assert text.returncode == 0, text.stderr
    assert re.search(r"^prompt +[\d.]+ tok/s \(.*\)\ndecode +[\d.]+ tok/s", text.stdout)
    done = command("bench", pocket, *size, "--json", "--expert-cache", "1MiB", "--threads", "1")
    report = json.loads(done.stdout)
    assert (report["threads"], report["slots"], report["seed"]) == (1, 17, 0)
    decode = report["decode"]
    assert decode["tokens"] == 8
    assert len(decode["rates"]) == 2
    experts = decode["experts"]
    assert experts["hits"] + experts["misses"] == 2 * 8 * 6 * 4
    assert experts["wasted"] == 0
    assert report["prompt"]["experts"]["bytes_read"] > 0
    none = command("bench", pocket, "--prompt", "0", "--tokens", "2", "--repeats", "1", "--json")
    assert json.loads(none.stdout)["prompt"] is None
    wrong = command("bench", pocket, "--ram", "little")
    assert wrong.returncode == 2
    assert "expected a size" in wrong.stderr


@pytest.mark.slow
def test_memory_stays_within_what_was_asked_for(large: Path, cgroup: Path) -> None:
    """The kernel would kill the process otherwise; what others count agrees."""
    ram = 250 * MIB
    (cgroup / "memory.limit_in_bytes").write_text(str(ram))
    script = f'echo $$ > {cgroup}/cgroup.procs; exec "$@"'
    size = ("--prompt", "64", "--tokens", "32", "--warmup", "0", "--repeats", "1", "--json")
    words = [sys.executable, "-m", "megrez_cli", "bench", str(large), *size]
    for budget in (("--ram", str(ram)), ()):  # asked for, or found out
        done = subprocess.run(
            ["bash", "-c", script, "bash", *words, *budget],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["resident"] <= ram
        assert needs_of(large).n_used <= report["slots"] < needs_of(large).n_experts
        assert report["decode"]["experts"]["misses"] > 0
    counts = dict(line.split() for line in (cgroup / "memory.oom_control").read_text().splitlines())
    assert counts.get("oom_kill", "0") == "0"
