"""Parts of benchmarks.span_study."""
