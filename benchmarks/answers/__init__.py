"""The parts of `benchmarks.answers_run`: plan, checks, prompts, servers, lanes and the merge."""
