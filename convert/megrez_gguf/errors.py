"""The errors a user can meet. Each carries one complete, actionable message."""


class MegrezError(Exception):
    """Base of every expected failure. The command line prints it and exits with `exit_code`."""

    exit_code = 2


class ConfigError(MegrezError):
    """`config.json` misses a field, has one of the wrong type, or asks for unsupported maths."""


class CheckpointError(MegrezError):
    """The shards, the index or a tensor in them are not what the configuration requires."""


class TokenizerError(MegrezError):
    """The tokenizer files cannot be expressed in GGUF without changing token ids."""


class GGUFError(MegrezError):
    """A GGUF file is damaged, or is not a Megrez2 model."""


class OutputError(MegrezError):
    """The output cannot be written: it exists, the disk is full, the folder is missing."""


class RuntimeUnavailableError(MegrezError):
    """The patched llama-cpp-python (or torch) that a command needs is not installed."""


class ThresholdError(MegrezError):
    """A measurement missed its threshold: the comparison ran, and its answer is no."""

    exit_code = 1
