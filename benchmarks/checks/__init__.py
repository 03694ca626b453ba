"""What `benchmarks.backends` looks at in one engine."""
