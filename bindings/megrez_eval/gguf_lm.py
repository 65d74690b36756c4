"""A GGUF file as lm-evaluation-harness's model: `LM`, in this process, by `megrez_runtime`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megrez_eval.answers import Answers, Progress
from megrez_eval.scoring import OUTPUTS, Scorer
from megrez_gguf.format.reader import GGUFFile
from megrez_llama.patched import require_patched
from megrez_llama.pieces import piece
from megrez_parity.provenance import file_sha256
from megrez_runtime import load
from megrez_runtime.session import Sampling
from megrez_runtime.template import ChatTemplate

# What tasks may ask of generation, and how sampling calls it.
GENERATION = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
MAX_TOKENS = 1024  # of an answer, where a task does not say


class GgufLM(TemplateLM):  # type: ignore[misc]
    """The model in the file `path`, with a context of `n_ctx` tokens and a KV cache of `cache`.

    Scores are exact: float64 log-softmax of the model's logits, one sequence at a time. Answers
    are drawn as tasks say, or as the file advises, or greedily; with `seed`, the n-th repetition of
    a question with `seed` + n. They are kept in the file `keep`. `options` go to
    `megrez_runtime.load`.

    Raises as `megrez_runtime.load` does.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        cache: str = "f16",
        sampling: Literal["task", "advised", "greedy"] = "task",
        seed: int = 0,
        keep: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options.setdefault("n_outputs_max", OUTPUTS)
        kind = getattr(require_patched(), f"GGML_TYPE_{cache.upper()}")
        options |= {"type_k": kind, "type_v": kind}
        # llama.cpp reads a quantized cache by flash attention only.
        options["flash_attn"] = cache not in ("f32", "f16")
        self.llm = load(path, n_ctx=n_ctx, **options)
        self.path, self._seed = path, seed
        self._sampling = {
            "task": None,
            "advised": Sampling.advised(self.llm.metadata),
            "greedy": Sampling(temp=0.0),
        }[sampling]
        self._progress = progress
        self._vocab = require_patched().llama_model_get_vocab(self.llm.model)
        self._scorer = Scorer(self.llm)
        self._template: ChatTemplate | None = None
        self._conversations: dict[str, list[int]] = {}  # by what the template makes of them
        self.cut = 0  # how many texts were too long and lost their beginnings
        told = {name: value for name, value in options.items() if name != "n_threads"}
        # Hashed, as the same name may be another model tomorrow: seconds, where answers are kept.
        model = file_sha256(GGUFFile.open(path)) if keep else ""
        identity = [model, self.max_length, told, seed, str(self._sampling)]
        self._answers = Answers(keep, str(identity))

    def close(self) -> None:
        """Free the model."""
        self.llm.close()

    @property
    def max_length(self) -> int:
        """Tokens that fit into the context."""
        size: int = self.llm.n_ctx()
        return size

    @property
    def eot_token_id(self) -> int:
        token: int = self.llm.token_eos()
        return token

    @property
    def prefix_token_id(self) -> int:
        bos: int = self.llm.token_bos()
        return bos if bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.path.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; a conversation keeps those that the chat template gave it."""
        if string in self._conversations:
            return self._conversations[string]
        raw = string.encode("utf-8", "replace")
        begin = add_special_tokens is not False
        ids: list[int] = self.llm.tokenize(raw, add_bos=begin and self._adds_bos, special=True)
        # A conversation that a task has added to begins with its own.
        return ids[1:] if begin and ids[:2] == [self.prefix_token_id] * 2 else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._conversations:  # it ends where the assistant begins
            raw = continuation.encode("utf-8", "replace")
            return self.tok_encode(context), self.llm.tokenize(raw, add_bos=False, special=False)
        before, after = super()._encode_pair(context, continuation)
        return before, after

    @property
    def _adds_bos(self) -> bool:
        return bool(self.llm._model.add_bos_token())

    # --- chat ---

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The file's template, which is the only one."""
        return self.llm.metadata.get("tokenizer.chat_template") if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """What the file's template makes of a conversation, as `megrez-gguf chat` would see it."""
        self._template = template = self._template or ChatTemplate(self.llm)
        messages = [template.message(m["role"], m["content"]) for m in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            ids = template.encode(messages)
        else:  # the last message is the beginning of the answer
            ids = [*template.encode(messages[:-1]), *messages[-1].tokens]
        spelled = b"".join(piece(self._vocab, token, special=True) for token in ids)
        text = spelled.decode("utf-8", "replace")
        self._conversations[text] = ids
        return text

    def _ends(self, token: int) -> bool:
        if self._template:
            return self._template.ends(token)
        return bool(require_patched().llama_vocab_is_eog(self._vocab, token))

    # --- what a harness asks ---

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def compute(wanted: Sequence[tuple[int, Any, int]]) -> Iterator[tuple[int, Any]]:
            # Neighbours begin alike, so that most of each is in the KV cache.
            for i, (context, continuation), _ in sorted(wanted, key=lambda w: [*w[1][0], *w[1][1]]):
                yield i, self._score(context, continuation)

        asked = [(context, continuation) for _, context, continuation in requests]
        found = self._answers.fill("loglikelihood", asked, compute, self._progress)
        return [(score, greedy) for score, greedy in found]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        tokens = (context + continuation)[-(self.max_length + 1) :]
        self.cut += len(tokens) < len(context) + len(continuation)
        first = max(1, len(tokens) - len(continuation))
        return self._scorer.score(tokens, first)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        def compute(wanted: Sequence[tuple[int, Any, int]]) -> Iterator[tuple[int, Any]]:
            for i, text, _ in wanted:
                windows = get_rolling_token_windows(
                    self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs = (make_disjoint_window(window) for window in windows)
                yield i, sum(self._score(*pair)[0] for pair in pairs)

        asked = [request.args[0] for request in requests]
        return self._answers.fill("rolling", asked, compute, self._progress)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        def compute(wanted: Sequence[tuple[int, Any, int]]) -> Iterator[tuple[int, Any]]:
            self._scorer.release()
            by_prompt = sorted(wanted, key=lambda w: (self.tok_encode(w[1][0]), w[0]))
            for i, (prompt, options), nth in by_prompt:
                yield i, self._generate(self.tok_encode(prompt), options, self._seed + nth)
            self._scorer.release()

        asked = [(request.args[0], request.args[1]) for request in requests]
        return self._answers.fill("generate", asked, compute, self._progress)

    def _generate(self, prompt: list[int], options: dict[str, Any], seed: int) -> str:
        given = normalize_gen_kwargs(options, MAX_TOKENS)
        sampling = self._sampling or Sampling(
            **{ours: given[name] for name, ours in GENERATION.items() if name in given}
        )
        room = min(given["max_gen_toks"], self.max_length - 1)
        self.cut += len(prompt) > self.max_length - room
        prompt = prompt[-(self.max_length - room) :]
        stops = [stop for stop in given["until"] if stop]
        self.llm.set_seed(seed % 0xFFFFFFFF)
        said = b""
        drawn = self.llm.generate(prompt, **dataclasses.asdict(sampling))
        for count, token in enumerate(drawn, 1):
            if self._ends(token):
                break
            said += piece(self._vocab, token)
            text = said.decode("utf-8", "ignore")
            if any(stop in text for stop in stops) or count == room:
                break
        text = said.decode("utf-8", "replace")
        for stop in stops:
            text = text.partition(stop)[0]
        return text
