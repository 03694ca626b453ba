"""What became of shadow requests of one server process, for /server_info."""

from __future__ import annotations

from collections import Counter
from typing import Any

from claa_sglang.shadow.agreement import Agreement

RESULTS = ("same", "different", "dropped", "failed")
KINDS = ("greedy", "sampled")


class Counts:
    """Shadow requests by kind of sampling and by result, and the answer tokens that were compared."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str]] = Counter()
        self._sums = {kind: Agreement(0, 0, 0, 0.0) for kind in KINDS}

    def count(self, kind: str, result: str, found: Agreement | None) -> None:
        """Count one of `kind` (of KINDS) with `result` (of RESULTS); found: None where nothing was compared."""
        self._requests[kind, result] += 1
        if found is not None:
            self._sums[kind] = self._sums[kind].plus(found)

    def stats(self) -> dict[str, Any]:
        """By kind: requests by result, tokens compared, and of these the sums and means, None where there are none.

        `agreement` is the share of tokens that agree, `before_difference` the tokens up to where answers part,
        `mean_logprob` what the dense model gives a token, in nats.
        """
        return {kind: self._of(kind) for kind in KINDS}

    def _of(self, kind: str) -> dict[str, Any]:
        total = self._sums[kind]
        return {
            **{result: self._requests[kind, result] for result in RESULTS},
            "tokens": total.tokens,
            "agreeing": total.agreeing,
            "before_difference": total.before_difference,
            "agreement": round(total.agreeing / total.tokens, 6) if total.tokens else None,
            "mean_logprob": round(total.logprob / total.tokens, 6) if total.tokens else None,
        }
