"""Rewards and judges: reward models, Python functions, TF-IDF judges, a lexicon, and language models over HTTP."""
