"""Where bytes live, and who owns them."""
