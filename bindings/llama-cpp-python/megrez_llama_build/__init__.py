"""Builds llama-cpp-python from the pinned upstream sdist and this repository's `patches/`.

`source` turns the pin, the overlay and the patches into a source tree; `backend` is the
PEP 517 build backend over it; `cache` keys and stores finished wheels. Nothing here imports
the rest of the repository: pip runs it alone, in an isolated environment.
"""
