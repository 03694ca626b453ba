"""Does pruning pay."""
