"""The parts of `benchmarks.eval_quality`: settings, endpoints, answers, statistics, timing and tables."""
