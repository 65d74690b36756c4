"""How a server is planned: clients, contexts and memory, from a file and wishes."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megrez_gguf.errors import GGUFError
from megrez_gguf.format.reader import GGUFFile
from megrez_llama import server
from megrez_runtime.errors import ContextError, MemoryBudgetError
from megrez_runtime.memory import Needs
from megrez_runtime.serving import PROGRAM, ServingPlan, plan_serving
from support.configurations import TINY
from support.gguf_edit import F32, STRING, Gguf
from support.server import serve_model
from support.shared import Shared

MIB = 1 << 20


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """free(bytes) makes the machine have so much available memory."""

    def free(nbytes: int | None) -> None:
        monkeypatch.setattr("megrez_runtime.memory.available_memory", lambda: nbytes)

    return free


@pytest.fixture(scope="module")
def long(shared: Shared) -> Path:
    """A small model whose contexts take more memory than its weights."""
    return shared.converted(shared.checkpoint(TINY | {"max_position_embeddings": 32768}))


def needs_of(path: Path) -> Needs:
    return replace(Needs.of(GGUFFile.open(path), path), program_bytes=PROGRAM)


def edited(path: Path, to: Path, edit: Callable[[Gguf], object]) -> Path:
    file = Gguf.read(path)
    edit(file)
    return file.write(to)


def settings(plan: ServingPlan, **changes: object) -> server.Settings:
    made = server.Settings(
        model=plan.path,
        hosts=("127.0.0.1",),
        port=8000,
        aliases=plan.names,
        n_slots=plan.n_slots,
        n_ctx=plan.n_ctx,
        n_ubatch=plan.n_ubatch,
        n_threads=1,
        n_gpu_layers=-1,
        expert_cache=plan.expert_cache,
        prompt_cache=plan.prompt_cache,
        sampling=plan.sampling,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_with_plenty_of_memory_four_clients_get_what_is_usual(
    long: Path, free: Callable[[int | None], None]
) -> None:
    free(64 << 30)
    plan = plan_serving(long)
    assert (plan.n_slots, plan.n_ctx, plan.n_ubatch) == (4, 8192, 512)
    assert plan.expert_cache is None
    # As many prompts again as there are contexts.
    assert plan.prompt_cache == 4 * needs_of(long).kv_bytes(8192) > 0
    assert plan.nbytes < 64 << 30
    assert "4 clients at once, 8192 tokens each" in str(plan)
    assert "64 GiB of memory are free" in str(plan)
    assert "all experts in memory" in str(plan)


@pytest.mark.parametrize(("ram", "memory"), [("off", 1), ("auto", None)])
def test_without_a_bound_nothing_is_reduced(
    long: Path, free: Callable[[int | None], None], ram: str, memory: int | None
) -> None:
    free(memory)
    plan = plan_serving(long, ram=ram)
    assert (plan.n_slots, plan.n_ctx, plan.expert_cache) == (4, 8192, None)
    assert plan.prompt_cache == 0
    assert "free" not in str(plan)


def test_clients_are_given_up_before_experts_and_those_before_context(long: Path) -> None:
    """As memory shrinks, each is given up only once the one before it has gone."""
    found = []
    ram = plan_serving(long, ram="off").nbytes + 8 * MIB
    while True:
        try:
            plan = plan_serving(long, ram=ram)
        except MemoryBudgetError as e:
            least = int(re.search(r"at least (\d+) MiB", str(e))[1])  # type: ignore[index]
            break
        assert plan.nbytes <= ram
        found.append((plan.n_ctx, plan.expert_cache is None, plan.n_slots))
        ram -= MIB // 8
    assert found == sorted(found, reverse=True)
    kinds = list(dict.fromkeys(found))
    assert kinds[:3] == [(8192, True, 4), (8192, True, 2), (8192, True, 1)]
    assert kinds[-1] == (1024, False, 1)
    assert plan_serving(long, ram=least * MIB).n_slots == 1


def test_what_is_asked_for_is_kept(long: Path) -> None:
    plan = plan_serving(long, n_ctx=3000, n_slots=7, ram="off")
    assert (plan.n_slots, plan.n_ctx) == (7, 3072)
    needs = replace(needs_of(long), n_slots=7)
    too_little = needs.least(3072) - MIB
    with pytest.raises(MemoryBudgetError, match=r"7 contexts of 3072 tokens .* at least"):
        plan_serving(long, n_ctx=3000, n_slots=7, ram=too_little)


def test_no_client_gets_more_than_the_model_was_trained_on(long: Path) -> None:
    plan = plan_serving(long, n_ctx=100_000, n_slots=1, ram="off")
    assert plan.n_ctx == 32768
    assert "trained on 32768" in plan.warnings[0]
    assert plan_serving(long, n_ctx=32768, ram="off").warnings == ()


def test_a_cache_of_ones_own_size(long: Path, free: Callable[[int | None], None]) -> None:
    free(64 << 30)
    needs = needs_of(long)
    plan = plan_serving(long, expert_cache=3 * needs.slot_bytes)
    assert plan.expert_cache == 3 * needs.slot_bytes
    assert plan.experts == (3, needs.n_experts)
    assert needs.at_once(plan.n_ubatch) <= plan.expert_cache
    assert f"3 of {needs.n_experts} experts in memory" in str(plan)
    with pytest.raises(MemoryBudgetError, match="at least"):
        plan_serving(long, expert_cache=needs.slot_bytes)
    free(1)  # asked for all the same, as small as may be
    assert plan_serving(long, expert_cache=3 * needs.slot_bytes).n_slots == 1


@pytest.mark.parametrize("n_slots", [0, 257])
def test_impossible_numbers_of_clients(long: Path, n_slots: int) -> None:
    with pytest.raises(ContextError, match="1 to 256"):
        plan_serving(long, n_slots=n_slots)


def test_impossible_contexts(shared: Shared) -> None:
    endless = shared.converted(shared.checkpoint(TINY | {"max_position_embeddings": 1 << 24}))
    with pytest.raises(ContextError, match="fewer than"):
        plan_serving(endless, n_slots=256, n_ctx=1 << 24, ram="off")


def test_a_file_without_a_template_is_refused(long: Path, tmp_path: Path) -> None:
    bare = edited(long, tmp_path / "bare.gguf", lambda f: f.values.pop("tokenizer.chat_template"))
    with pytest.raises(GGUFError, match="no chat template"):
        plan_serving(bare)


def test_names_and_sampling_are_the_file_s(long: Path, tmp_path: Path) -> None:
    def edit(file: Gguf) -> None:
        file.values["general.name"] = (STRING, "Own, name")
        file.values["general.sampling.temp"] = (F32, 0.25)
        del file.values["general.sampling.top_p"]

    plan = plan_serving(edited(long, tmp_path / "mine-q4.gguf", edit), ram="off")
    # A comma would make two names of one.
    assert plan.names == ("megrez-moe", "mine-q4")
    words = server.arguments(settings(plan))
    assert option(words, "--alias") == "megrez-moe,mine-q4"
    # What the file does not say is as in a chat, not as upstream would have it.
    sampling = [option(words, f"--{name}") for name in ("temp", "top-p", "top-k", "min-p")]
    assert [float(value) for value in sampling] == [0.25, 1, 0, 0]


def test_what_the_server_is_told(long: Path) -> None:
    plan = plan_serving(long, n_ctx=512, n_slots=3, ram="off")
    words = server.arguments(settings(plan))
    assert option(words, "--ctx-size") == "1536"
    assert option(words, "--parallel") == "3"
    assert option(words, "--cors-origins") == ""
    # One context for all would let one client end the answers of others.
    assert "--no-kv-unified" in words
    assert "--no-ui" in words
    counted = "megrez-moe.expert_counts=bool:true"
    assert option(words, "--override-kv") == counted
    stored = server.arguments(settings(plan, expert_cache=MIB, page=Path("page")))
    assert option(stored, "--override-kv") == f"{counted},megrez-moe.expert_cache=int:{MIB}"
    assert option(stored, "--load-mode") == "none"
    assert option(stored, "--path") == "page"
    assert "--no-ui" not in stored


def test_the_environment_changes_nothing() -> None:
    before = {"LLAMA_ARG_TOOLS": "all", "LLAMA_API_KEY": "x", "AIP_MODE": "PREDICTION", "HOME": "/"}
    assert server.environment(before) == {"HOME": "/"}


@pytest.mark.slow
def test_the_server_stays_within_its_memory(large: Path, cgroup: Path, tmp_path: Path) -> None:
    """With several clients at once; the kernel would kill it otherwise, page cache counted."""
    ram = 250 * MIB
    (cgroup / "memory.limit_in_bytes").write_text(str(ram))
    within = ("bash", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "bash")
    options = ("--ram", str(ram), "--parallel", "4", "--ctx", "256")
    with serve_model(large, tmp_path, *options, within=within) as server:
        assert "the others read when needed" in server.log.read_text("utf-8")

        def ask(number: int) -> int:
            prompt = [100 + number + i for i in range(48)]
            body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True}
            return server.post("/v1/completions", body).status

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, range(6))) == [200] * 6
        assert server.memory("VmHWM") <= ram
    counts = dict(line.split() for line in (cgroup / "memory.oom_control").read_text().splitlines())
    assert counts.get("oom_kill", "0") == "0"
