"""Channel pruning: what belongs together, what counts, what goes, and cutting it out."""
