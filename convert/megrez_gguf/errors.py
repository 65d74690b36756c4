"""The errors a user can meet. Each carries one complete, actionable message."""

from megrez_llama.errors import GGUFError, MegrezError, RuntimeUnavailableError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "GGUFError",
    "MegrezError",
    "OutputError",
    "RuntimeUnavailableError",
    "SourceError",
    "ThresholdError",
    "TokenizerError",
]


class ConfigError(MegrezError):
    """`config.json` misses a field, has one of the wrong type, or asks for unsupported maths."""


class CheckpointError(MegrezError):
    """The shards, the index or a tensor in them are not what the configuration requires."""


class SourceError(MegrezError):
    """The checkpoint is no path here, and its hub does not give it."""


class TokenizerError(MegrezError):
    """The tokenizer files cannot be expressed in GGUF without changing token ids."""


class OutputError(MegrezError):
    """The output cannot be written: it exists, the disk is full, the folder is missing."""


class ThresholdError(MegrezError):
    """A measurement missed its threshold: the comparison ran, and its answer is no."""

    exit_code = 1
