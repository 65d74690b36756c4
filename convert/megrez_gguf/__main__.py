"""`python -m megrez_gguf`: the command `megrez-gguf`. No part of the library."""

from megrez_cli import main

if __name__ == "__main__":
    main()
