"""Lets SGLang start on a CPU from what the package index has; on PYTHONPATH, for tests.

SGLang's kernels for CPUs are built from source, and its wheel asks for torchvision built with CUDA.
It imports both at its start, and needs neither for a text model on its torch code: AMX kernels,
speculative decoding and images do. So they are modules here whose functions say that they are
missing when they are called.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

MISSING = ("sgl_kernel", "torchvision")


class Missing:
    """A name in one of them, and what is looked up in it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.name}.{name}")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self.name} is not here")


class StandIn(ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012  (what it contains may be imported)
    __version__ = "0"

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


class Finder:
    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, Finder) if name.split(".")[0] in MISSING else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        if module.__name__ == "sgl_kernel":
            pin_nothing()


def pin_nothing() -> None:
    """SGLang's adapters pin memory for a GPU, and torch refuses where there is none."""
    import torch

    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    for name in ("tensor", "empty", "zeros", "ones"):
        make = getattr(torch, name)

        def unpinned(*args: Any, make: Any = make, **kwargs: Any) -> Any:
            return make(*args, **kwargs | {"pin_memory": False})

        setattr(torch, name, unpinned)


sys.meta_path.append(Finder)
