"""Does a file still answer? lm-evaluation-harness on GGUF files. See README.md."""
