"""Papers as experiments: claims with criteria, runs over seeds, verdicts and figures."""
