"""What a run cost the server, and what it left in the server's prefix cache."""

from __future__ import annotations

import threading
import time
from typing import Any


class Cost:
    """Counts of what was sent; threads may add at once.

    requests: answered ones. prompt, generated: their tokens. computed: prompt tokens that were not cached.
    """

    def __init__(self) -> None:
        self.requests = self.prompt = self.computed = self.generated = 0
        self._lock = threading.Lock()
        self._began = time.perf_counter()

    def add(self, prompt: int, cached: int, generated: int) -> None:
        """One answered request, in tokens."""
        with self._lock:
            self.requests += 1
            self.prompt += prompt
            self.computed += prompt - cached
            self.generated += generated

    @property
    def entered(self) -> int:
        """Tokens that went into the prefix cache at most: prompts that were not there, and answers behind them."""
        return self.computed + self.generated

    def record(self, pool: int | None) -> dict[str, Any]:
        """JSON values. pool: tokens of the server's KV pool; None if it does not say."""
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt,
            "generated_tokens": self.generated,
            "seconds": round(time.perf_counter() - self._began, 1),
            "cache_entered_tokens": self.entered,
            "pool_tokens": pool,
        }

    def lines(self, pool: int | None) -> list[str]:
        """In words."""
        seconds = time.perf_counter() - self._began
        share = f", {self.entered / pool:.0%} of a pool of {pool:,}" if pool else ""
        return [
            f"Cost: {self.requests:,} requests, {self.prompt:,} prompt tokens, {self.generated:,} generated tokens, "
            f"{seconds:,.0f} s.",
            f"Left in the prefix cache: at most {self.entered:,} tokens{share}.",
            "They are under keys of this run alone, and the server evicts what was used longest ago first.",
        ]
