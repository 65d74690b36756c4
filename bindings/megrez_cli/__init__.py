"""The command line of megrez-gguf: above all other packages, imported by none."""

from megrez_cli.app import app, main

__all__ = ["app", "main"]
