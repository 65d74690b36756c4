"""A checkpoint in transformers or vLLM as the harness's model, by the harness's own classes."""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import get_model

from megrez_gguf.errors import ConfigError, RuntimeUnavailableError

ENGINES = {"transformers": "hf", "vllm": "vllm"}  # our name -> the harness's


def open_engine(text: str, checkpoint: str) -> LM:
    """`text` is NAME[:OPTION=VALUE,...]; options are those of the harness's model.

    Raises ConfigError: an engine nobody knows. RuntimeUnavailableError: it is not installed.
    """
    name, _, rest = text.partition(":")
    if name not in ENGINES:
        raise ConfigError(f"no engine is called {name}; known: {', '.join(ENGINES)}")
    given: dict[str, Any] = dict(part.split("=", 1) for part in rest.split(",") if "=" in part)
    try:
        import torch

        import megrez_engines  # noqa: F401

        options = {"dtype": "bfloat16"}
        if name == "transformers":  # it would ask for a GPU
            options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        return get_model(ENGINES[name])(pretrained=checkpoint, **{**options, **given})
    except ImportError as e:
        raise RuntimeUnavailableError(
            f"{name} is not here ({e}): pip install 'megrez-gguf[{name}]'"
        ) from None
