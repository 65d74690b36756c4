"""`python -m megrez_cli`: the command `megrez-gguf`."""

from megrez_cli import main

main()
