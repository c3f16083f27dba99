"""What one does with a model on the command line: talk to it, sample, score texts, and hand it to others."""
