"""What the issue asks for: one H200, the shape of Llama-3.1-8B, chunks of 8,192 tokens, keep rate 0.2, medians of 5.

Shown beside every run of that shape, on whatever GPU; judged ("ok", "missed") by the medians.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.ttft import variants
from benchmarks.ttft.variants import PER_TOKEN, TTFT, auto, keep, over_kept, per_token

SHAPE = "llama-3.1-8b"
OF_STOCK, OF_BOUND, SECONDS = "of stock", "of bound", "seconds more than stock"
OWN_STARTUP = 2.0  # seconds of a start that the plugin may take, in all processes; on any model and device
PRUNED, AUTO = keep(0.2), auto(0.2)


class Target(NamedTuple):
    """The value of `quantity` of `variant`, as a share of stock's or of the bound (or as seconds), lies in [low, high].

    tokens: None for any.
    """

    scenario: str
    tokens: int | None
    quantity: str
    variant: str
    kind: str
    high: float
    low: float = 0.0

    @property
    def text(self) -> str:
        """The range in words."""
        return f"{self.low:g} to {self.high:g}" if self.low else f"at most {self.high:g}"

    def met(self, value: float) -> bool:
        """Whether `value` is in the range."""
        return self.low <= value <= self.high


TARGETS = (
    Target("cold", 10_240, TTFT, PRUNED, OF_STOCK, 0.61),
    Target("cold", 32_768, TTFT, PRUNED, OF_STOCK, 0.58),
    Target("cold", 131_072, TTFT, PRUNED, OF_STOCK, 0.55),
    Target("cold", 10_240, TTFT, PRUNED, OF_BOUND, 1.02),
    Target("cold", 32_768, TTFT, PRUNED, OF_BOUND, 1.02),
    Target("cold", 131_072, TTFT, PRUNED, OF_BOUND, 1.02),
    Target("dense", None, TTFT, variants.DENSE, OF_STOCK, 1.01, 0.99),
    Target("dense", None, PER_TOKEN, variants.DENSE, OF_STOCK, 1.01, 0.99),
    # The bound of a second turn is 1.1 * late(kN) + stock's own second turn: see report.second_turn_bound.
    Target("second-turn", 32_768, TTFT, PRUNED, OF_BOUND, 1.0),
    Target("growing-chat", 32_768, variants.SUM_TTFT, AUTO, OF_STOCK, 1.02),
    Target("decode", 32_768, PER_TOKEN, PRUNED, OF_STOCK, 0.85),
    Target("decode", 65_536, PER_TOKEN, PRUNED, OF_STOCK, 0.75),
    Target("decode", 32_768, per_token(8), PRUNED, OF_STOCK, 0.85),
    Target("decode", 65_536, per_token(8), PRUNED, OF_STOCK, 0.75),
    Target("decode", 32_768, per_token(8), over_kept(0.2), OF_STOCK, 0.60),
    Target("decode", 131_072, per_token(8), over_kept(0.2), OF_STOCK, 0.45),
    Target("burst", 16_384, variants.total(8), PRUNED, OF_STOCK, 0.62),
    Target("startup", None, variants.START, variants.CLAA, SECONDS, OWN_STARTUP),
)


def find(scenario: str, tokens: int, quantity: str, variant: str, kind: str) -> Target | None:
    """The target for this value, None where the issue names none."""
    for target in TARGETS:
        named = target.tokens in (None, tokens)
        if named and (scenario, quantity, variant, kind) == (
            target.scenario,
            target.quantity,
            target.variant,
            target.kind,
        ):
            return target
    return None
