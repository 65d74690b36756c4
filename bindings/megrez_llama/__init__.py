"""The boundary with llama.cpp: all that this project knows of its inside.

To bump the pin means to read this folder and `patches/` again, and nothing else:

    patched       the one door to llama_cpp: only a build that knows Megrez2 passes
    logs          llama.cpp's log, kept off the terminal and remembered for error messages
    ggml          struct ggml_tensor, and reading tensors through it
    engine        evaluating a file exactly, and the graph's nodes by name
    nodes         the graph's nodes by name, and what enters which matrix
    expert_store  our own C functions of the expert store
    server        llama.cpp's server: where its program is, and its options
    quantizer     which type a level gives each tensor; ggml's encoding of rows

It is the lowest package, because conversion needs llama.cpp's quantizer. Importing any module of it
imports no llama_cpp: that happens on first use.
"""

ARCH = "megrez-moe"
"""The architecture's name: in GGUF files, before our keys in them, and in the patched llama.cpp."""

MAX_LAYERS = 512
MAX_EXPERTS = 1024
"""The most that its arrays have room for: LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS."""
