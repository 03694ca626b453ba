"""Pruned requests that are answered dense as well, while the server is idle, and what the two answers agree on."""
