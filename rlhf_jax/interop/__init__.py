"""Foreign formats, import and export: Hugging Face checkpoints, GGUF files, PEFT adapters, and the Hub."""
