"""A checkpoint in transformers or vLLM as the harness's model, by the harness's own classes."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import get_model

from megrez_gguf.errors import ConfigError, RuntimeUnavailableError

# Our name -> the harness's, and what each wants to know beside the checkpoint.
ENGINES = {
    "transformers": ("hf", {"dtype": "bfloat16"}),
    "vllm": ("vllm", {"dtype": "bfloat16"}),
}


def open_engine(text: str, checkpoint: str) -> LM:
    """`text` is NAME[:OPTION=VALUE,...]; options are those of the harness's model.

    Raises ConfigError: an engine nobody knows. RuntimeUnavailableError: it is not installed.
    """
    name, _, rest = text.partition(":")
    if name not in ENGINES:
        raise ConfigError(f"no engine is called {name}; known: {', '.join(ENGINES)}")
    theirs, options = ENGINES[name]
    given: dict[str, Any] = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    try:
        import megrez_engines  # noqa: F401

        return get_model(theirs)(pretrained=checkpoint, **{**options, **given})
    except ImportError as e:
        raise RuntimeUnavailableError(
            f"{name} is not here ({e}): pip install 'megrez-gguf[{name}]'"
        ) from None
