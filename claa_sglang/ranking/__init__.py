"""Which tokens matter."""
