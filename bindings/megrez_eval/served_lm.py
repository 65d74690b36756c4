"""A model behind an OpenAI URL as lm-evaluation-harness's model.

Answers come from chat completions, or completions where no chat is asked for. Given text is scored
by completions with `echo` and `logprobs`, which few servers have: vLLM has, llama-server has not.
One that ignores `echo` would have every choice score alike, so each response is looked at.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs

from megrez_eval.answers import Answers, Progress
from megrez_gguf.errors import ConfigError, SourceError

MAX_TOKENS = 1024  # of an answer, where a task does not say
# What tasks may ask of generation, and servers take by the same name.
GENERATION = ("temperature", "top_p", "top_k", "min_p")


class Refused(SourceError):
    """The server took the request, and says no to it."""


class ServedLM(LM):  # type: ignore[misc]
    """The model at `url`, e.g. http://127.0.0.1:8000/v1; `model` is its first unless given.

    `concurrency` requests run at once; `sampling` is used in place of a task's own. A key comes
    from OPENAI_API_KEY. Raises SourceError: nothing answers there, or not as OpenAI's servers do.
    ConfigError, when scores are asked for: this server cannot give them.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        concurrency: int = 4,
        sampling: dict[str, float] | None = None,
        seed: int = 0,
        keep: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self._url, self._seed, self._progress = url.rstrip("/"), seed, progress
        self._concurrency, self._sampling = concurrency, sampling
        self.model = model or self._first_model()
        self._answers = Answers(keep, str([self._url, self.model, seed, sampling]))

    def _first_model(self) -> str:
        models = self._ask("/models")
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise SourceError(f"{self._url}/models names no model") from None

    def _ask(self, path: str, **body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as e:
            said = e.read(2000).decode("utf-8", "replace")
            kind = Refused if 400 <= e.code < 500 else SourceError
            raise kind(f"{self._url}{path}: {e.code} {e.reason}: {said}") from None
        except (OSError, ValueError) as e:
            raise SourceError(f"{self._url}{path}: {e}") from None

    @property
    def tokenizer_name(self) -> str:
        return self.model

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages themselves: the server has the template."""
        return json.dumps(chat_history, ensure_ascii=False)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        def one(request: Any, _: int) -> tuple[float, bool]:
            context, continuation = request
            if _messages(context) is not None:
                raise ConfigError(
                    "a server's chat cannot score given text: ask without the chat template"
                )
            return self._score(context, continuation)

        found = self._each("loglikelihood", [request.args for request in requests], one)
        return [(value, greedy) for value, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        texts = [request.args[0] for request in requests]
        return self._each("rolling", texts, lambda text, _: self._score("", text)[0])

    def _score(self, context: str, continuation: str) -> tuple[float, bool]:
        text = context + continuation
        try:
            answer = self._ask(
                "/completions", model=self.model, prompt=text, max_tokens=1, echo=True,
                logprobs=1, temperature=0,
            )  # fmt: skip
            choice = answer["choices"][0]
            found = choice["logprobs"]
            columns = ("tokens", "token_logprobs", "text_offset", "top_logprobs")
            rows = list(zip(*(found[name] for name in columns), strict=True))
            assert choice["text"].startswith(text)
            rows = [row for row in rows if len(context) <= row[2] < len(text)]
            if rows and rows[0][1] is None:  # nothing comes before the first token
                del rows[0]
            assert all(row[1] <= 1e-3 for row in rows)
            greedy = all(row[1] >= max(row[3].values()) for row in rows)
            return float(sum(row[1] for row in rows)), greedy
        except (Refused, LookupError, TypeError, ValueError, AssertionError, AttributeError) as e:
            said = f" It says: {e}" if isinstance(e, Refused) else ""
            raise ConfigError(
                f"{self._url} does not score text that it is given (completions with echo and "
                "logprobs), so tasks of choices and perplexities would mean nothing: ask for tasks "
                f"with answers, or run the file itself: megrez-gguf eval FILE.gguf.{said}"
            ) from None

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._each("generate", [request.args for request in requests], self._generate)

    def _generate(self, request: Any, nth: int) -> str:
        prompt, options = request
        given = normalize_gen_kwargs(options, MAX_TOKENS)
        stops = [stop for stop in given["until"] if stop]
        sampling = self._sampling or {k: given[k] for k in GENERATION if k in given}
        body = {
            "model": self.model,
            "max_tokens": given["max_gen_toks"],
            "seed": self._seed + nth,
            "stop": stops[:4] or None,  # as many as OpenAI takes; all are looked for below
            **sampling,
        }
        messages = _messages(prompt)
        path, asked = ("/completions", {"prompt": prompt})
        if messages is not None:
            path, asked = "/chat/completions", {"messages": messages}
        choice = self._ask(path, **body, **asked)["choices"][0]
        text = str((choice["message"]["content"] if messages else choice["text"]) or "")
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _each(self, kind: str, requests: Sequence[Any], one: Any) -> list[Any]:
        def compute(wanted: Sequence[tuple[int, Any, int]]) -> Iterator[tuple[int, Any]]:
            with ThreadPoolExecutor(self._concurrency) as pool:
                jobs = {pool.submit(one, request, nth): i for i, request, nth in wanted}
                try:
                    for job in as_completed(jobs):
                        yield jobs[job], job.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

        return self._answers.fill(kind, requests, compute, self._progress)


def _messages(text: str) -> list[dict[str, str]] | None:
    """The conversation that `apply_chat_template` wrote, or None."""
    if not text.startswith('[{"role":'):
        return None
    try:
        messages: list[dict[str, str]] = json.loads(text)
    except ValueError:
        return None
    return messages
