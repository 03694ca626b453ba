"""Parts of benchmarks.block_study."""
