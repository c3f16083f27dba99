"""Formats of others, in and out: Hugging Face checkpoints, GGUF files, PEFT adapters, and the hub they come from."""
