"""A process that runs Megrez2 in an engine and answers what is asked of it: `python -m` this.

One JSON object a line, on stdin and stdout. The first names the engine, the checkpoint and the
engine's options; the answer tells what runs. Then, until stdin ends:

    {"tokenize": TEXT}                                       -> {"tokens": [...]}
    {"run": TOKENS, "first": N, "capture": NAMES, "to": P}   -> {"nodes": [[NAME, LAYER], ...]}

`run` writes float32 logits of positions N on but the last, `[S - 1 - N, V]`, to P.npy, and the
states NAMES of every layer, as far as the engine can tell them, to P.NAME.LAYER.npy: "ffn_norm" and
"l_out" `[S, D]`, "ffn_moe_topk" `[S, K]`, int32 (see `megrez_llama.nodes`). What fails is answered
by {"error": WHY}. Everything the engine prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray


class Runner(Protocol):
    """An engine with a model in it."""

    tokenizer: Any
    version: str
    weights: int  # bytes of them in memory, on all devices

    def run(self, tokens: list[int], first: int, capture: list[str], to: str) -> Nodes:
        """Write what "run" asks for, and tell which states there are."""


Nodes = list[tuple[str, int]]


def _write(states: dict[tuple[str, int], NDArray[Any]], capture: list[str], to: str) -> Nodes:
    """Write those of `states` that `capture` names, and tell which there are."""
    nodes = [at for at in states if at[0] in capture]
    for name, layer in nodes:
        np.save(f"{to}.{name}.{layer}.npy", states[name, layer])
    return nodes


class TransformersRunner:
    """Options: `dtype`, `attention` (attn_implementation), `experts` (experts_implementation)."""

    def __init__(
        self, checkpoint: str, dtype: str = "float32", attention: str = "", experts: str = ""
    ) -> None:
        import torch
        import transformers

        given = {"attn_implementation": attention, "experts_implementation": experts}
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=getattr(torch, dtype),
            **{name: value for name, value in given.items() if value},
        ).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
        self.version = f"transformers {transformers.__version__}"
        stored = self.model.state_dict().values()
        self.weights = sum({t.data_ptr(): t.nbytes for t in stored}.values())
        self._kept: dict[tuple[str, int], NDArray[Any]] = {}
        for i, layer in enumerate(self.model.model.layers):
            layer.post_attention_layernorm.register_forward_hook(self._keep("ffn_norm", i))
            layer.register_forward_hook(self._keep("l_out", i))
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._keep("ffn_moe_topk", i))

    def _keep(self, name: str, layer: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            if name == "ffn_moe_topk":
                self._kept[name, layer] = output[2].int().numpy()
            else:
                state = output[0] if isinstance(output, tuple) else output
                self._kept[name, layer] = state[0].float().numpy()

        return hook

    def run(self, tokens: list[int], first: int, capture: list[str], to: str) -> Nodes:
        import torch

        self._kept.clear()
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0, first:-1]
        np.save(to + ".npy", logits.float().numpy())
        return _write(self._kept, capture, to)


class VllmRunner:
    """Options: `dtype`, `tp`, `pp`, `max_num_batched_tokens`. With stages it tells no states."""

    def __init__(
        self,
        checkpoint: str,
        context: int,
        dtype: str = "float32",
        tp: str = "1",
        pp: str = "1",
        max_num_batched_tokens: str = "",
    ) -> None:
        import vllm

        more: dict[str, Any] = {"enforce_eager": True}
        if int(pp) > 1:  # vLLM compiles stages; this is as near as it comes to none
            more = {"compilation_config": {"mode": 1, "backend": "eager"}}
        if max_num_batched_tokens:
            more["max_num_batched_tokens"] = int(max_num_batched_tokens)
        self.model = vllm.LLM(
            checkpoint,
            dtype=dtype,
            tensor_parallel_size=int(tp),
            pipeline_parallel_size=int(pp),
            max_model_len=context + 1,  # it must generate a token
            max_logprobs=-1,
            logprobs_mode="raw_logits",
            enable_prefix_caching=False,
            worker_extension_cls="megrez_engines.vllm_probe.Probe",
            **more,
        )
        self.weights = sum(self.model.collective_rpc("probe_weights"))
        self.tells = int(pp) == 1
        if self.tells:
            self.model.collective_rpc("probe_start")
        self.tokenizer = self.model.get_tokenizer()
        self.version = f"vllm {vllm.__version__}"
        self.n_vocab = self.model.model_config.get_vocab_size()

    def run(self, tokens: list[int], first: int, capture: list[str], to: str) -> Nodes:
        import vllm

        if self.tells:
            self.model.collective_rpc("probe_clear")
        asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, flat_logprobs=True)
        prompt = {"prompt_token_ids": tokens}
        (result,) = self.model.generate([prompt], asked, use_tqdm=False)
        found = result.prompt_logprobs
        rows = np.full((len(tokens) - 1 - first, self.n_vocab), np.nan, np.float32)
        for row in range(len(rows)):
            at = first + row + 1  # what comes after a position stands at the next
            span = slice(found.start_indices[at], found.end_indices[at])
            rows[row, found.token_ids[span]] = found.logprobs[span]
        np.save(to + ".npy", rows)
        if not self.tells:
            return []
        ranks = self.model.collective_rpc("probe_take", args=(to, len(tokens)))
        return [at for rank in ranks for at in rank]


class SglangRunner:
    """Options: `dtype`, `tp`, `pp`, `chunked_prefill_size`. Without a GPU it runs on the CPU."""

    def __init__(
        self,
        checkpoint: str,
        context: int,
        dtype: str = "float32",
        tp: str = "1",
        pp: str = "1",
        chunked_prefill_size: str = "-1",
    ) -> None:
        import torch

        more: dict[str, Any] = {}
        if not torch.cuda.is_available():
            os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read when SGLang is imported
            more = {"device": "cpu", "attention_backend": "torch_native"}
            more["mem_fraction_static"] = 0.9  # of what is free; its own guess can be below zero
        import sglang

        from megrez_engines import sglang_probe

        self.folder = Path(tempfile.mkdtemp())
        self.take = sglang_probe.take
        self.model = sglang.Engine(
            model_path=checkpoint,
            dtype=dtype,
            tp_size=int(tp),
            pp_size=int(pp),
            context_length=context + 8,  # it generates a token, and keeps some back
            max_total_tokens=2 * context,
            chunked_prefill_size=int(chunked_prefill_size),
            disable_radix_cache=True,
            cuda_graph_backend_decode="disabled",
            cuda_graph_backend_prefill="disabled",
            forward_hooks=sglang_probe.hooks(self.folder),
            **more,
        )
        self.tokenizer = self.model.tokenizer_manager.tokenizer
        self.version = f"sglang {sglang.__version__}"
        self._generate([0])
        self.weights = sum(int(path.read_text()) for path in self.folder.glob("weights.*"))

    def _generate(self, tokens: list[int]) -> dict[tuple[str, int], NDArray[Any]]:
        self.model.generate(input_ids=tokens, sampling_params={"max_new_tokens": 1})
        return self.take(self.folder)

    def run(self, tokens: list[int], first: int, capture: list[str], to: str) -> Nodes:
        found = self._generate(tokens)
        np.save(to + ".npy", found["logits", 0][first:-1])
        return _write(found, capture, to)


RUNNERS = {"transformers": TransformersRunner, "vllm": VllmRunner, "sglang": SglangRunner}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer `requests` until they end."""

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        job = json.loads(requests.readline())
        options = dict(job["options"])
        if job["engine"] != "transformers":
            options["context"] = job["context"]
        runner: Runner = RUNNERS[job["engine"]](job["checkpoint"], **options)
        sample = runner.tokenizer("a").input_ids
        starts = bool(sample) and sample[0] == runner.tokenizer.bos_token_id
        answer(
            version=runner.version,
            weights=runner.weights,
            bos=sample[0] if starts else None,
        )
        for line in requests:
            request = json.loads(line)
            if "tokenize" in request:
                ids = runner.tokenizer(request["tokenize"], add_special_tokens=False).input_ids
                answer(tokens=ids)
                continue
            asked = (request["run"], request["first"], request["capture"], request["to"])
            answer(nodes=runner.run(*asked))
    except Exception as e:
        answer(error=f"{type(e).__name__}: {e}")
        raise


def main() -> None:
    # What libraries print must not come between answers, neither here nor in processes they start.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import megrez_engines  # noqa: F401

    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
