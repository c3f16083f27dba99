"""Plans of experiments: programs compiled for machines that are not at hand, with their memory and their costs."""
