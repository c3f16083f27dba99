"""Mathematics on arrays: pure functions, each with its equation and its source. No model, no file, no config."""
