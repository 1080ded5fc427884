"""Hardware backends: where the finished model runs."""
