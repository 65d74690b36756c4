"""Megrez2 checkpoints to GGUF."""
