"""The base of all expected failures, and those that the boundary with llama.cpp raises.

`megrez_gguf.errors` has these and all others.
"""


class MegrezError(Exception):
    """Base of every expected failure. The command line prints it and exits with `exit_code`.

    `option` names the keyword argument that would help, where there is one, and `value` what it
    should be: the message states the fact, and whoever called knows how the argument is given.
    """

    exit_code = 2

    def __init__(self, message: str, *, option: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.option, self.value = option, value


class GGUFError(MegrezError):
    """A GGUF file is damaged, is not a Megrez2 model, or is refused by llama.cpp."""


class RuntimeUnavailableError(MegrezError):
    """The patched llama-cpp-python (or torch) that a command needs is not installed."""
