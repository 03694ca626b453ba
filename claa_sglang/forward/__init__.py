"""What one forward computes."""
