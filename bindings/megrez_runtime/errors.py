"""The failures of running a model, beyond those of its file."""

from megrez_gguf.errors import MegrezError


class ContextError(MegrezError):
    """The context cannot hold what was asked of it: a prompt too long, or no memory for it."""


class DecodeError(MegrezError):
    """llama.cpp failed in the middle of evaluating the model."""


class MemoryBudgetError(MegrezError):
    """The memory allowed cannot hold what the model needs at once. The message names the least."""
