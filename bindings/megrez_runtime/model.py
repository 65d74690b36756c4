"""Load a Megrez2 GGUF, with errors that say what is wrong."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megrez_gguf.errors import GGUFError
from megrez_gguf.gguf_file import GGUFFile
from megrez_gguf.logs import log
from megrez_gguf.machine import available_cpus
from megrez_gguf.patched import ARCH, require_patched
from megrez_runtime.errors import ContextError

if TYPE_CHECKING:
    from llama_cpp import Llama

# At the published size a token of context takes 62 KiB, so this is half a gigabyte.
DEFAULT_CONTEXT = 8192
# llama.cpp rounds contexts up to a multiple of this, and llama_cpp's buffers must agree with it.
_CONTEXT_STEP = 256


def load(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    verbose: bool = False,
    **options: Any,
) -> Llama:
    """The model in the GGUF file `path`, ready to run.

    `n_ctx` is in tokens, and rounded up to a multiple of 256 (default: what the model was trained
    on, at most 8192). `n_threads` defaults to all CPUs this process may use, `n_gpu_layers` to all
    layers, which means none in a build for the CPU. `options` go to `llama_cpp.Llama`. llama.cpp's
    log is silent unless `verbose`.

    Raises GGUFError: no such file, damaged, not a Megrez2 model, or refused by llama.cpp (with its
    reason). ContextError: no memory for the context. RuntimeUnavailableError: llama_cpp is missing
    or unpatched. TypeError: an option `llama_cpp.Llama` does not have.
    """
    path = Path(path)
    values = GGUFFile.open(path).values
    arch = values.get("general.architecture")
    if arch != ARCH:
        raise GGUFError(
            f"{path}: general.architecture is {arch!r}, not {ARCH!r}: not a Megrez2 model"
        )
    trained = values.get(f"{ARCH}.context_length")
    if n_ctx is None:
        n_ctx = min(trained if type(trained) is int else DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if not 0 < n_ctx < 1 << 31:
        raise ContextError(f"a context of {n_ctx} tokens: expected 1 or more, and below 2^31")
    n_ctx = -(-n_ctx // _CONTEXT_STEP) * _CONTEXT_STEP

    llama_cpp = require_patched()
    unknown = options.keys() - inspect.signature(llama_cpp.Llama).parameters.keys()
    if unknown:
        raise TypeError(f"llama_cpp.Llama has no option {', '.join(sorted(unknown))}")
    from jinja2 import TemplateError

    log.install(llama_cpp, verbose)
    threads = n_threads or available_cpus()
    options = {"n_threads_batch": threads} | options
    try:
        llm = llama_cpp.Llama(
            str(path),
            n_ctx=n_ctx,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            verbose=verbose,
            **options,
        )
    except TemplateError as e:
        raise GGUFError(f"{path}: its chat template is not valid Jinja: {e}") from None
    except (ValueError, RuntimeError) as e:
        reason = log.take_errors() or str(e)
        if "llama_context" in str(e):
            raise ContextError(
                f"{path}: no context of {n_ctx} tokens can be made: {reason}. If it is memory "
                "that lacks, ask for a shorter one (--ctx)"
            ) from None
        raise GGUFError(f"{path}: llama.cpp cannot load it: {reason}") from None
    # llama_cpp drops the last byte of a text that just fills its buffer; ours are whole.
    llm.metadata |= {key: value for key, value in values.items() if isinstance(value, str)}
    return llm
