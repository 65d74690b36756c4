"""The base of all expected failures, and those that the boundary with llama.cpp raises.

`megrez_gguf.errors` has these and all others.
"""


class MegrezError(Exception):
    """Base of every expected failure. The command line prints it and exits with `exit_code`."""

    exit_code = 2


class GGUFError(MegrezError):
    """A GGUF file is damaged, is not a Megrez2 model, or is refused by llama.cpp."""


class RuntimeUnavailableError(MegrezError):
    """The patched llama-cpp-python (or torch) that a command needs is not installed."""
