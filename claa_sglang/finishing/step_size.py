"""How many tokens one step of finishing computes: few enough that a request which arrives hardly waits for it.

A step costs what launching its layers takes, however few tokens it has: on an H200 25 ms for all 32 layers of a model,
of which a step runs the late ones. So its size goes by what tokens add to that.
"""

from __future__ import annotations

from claa_sglang.config.config import ClaaConfig
from claa_sglang.policy.cost import Costs, Work, span_work

SECONDS = 0.010  # about what the tokens of one step take
LEAST = 64  # tokens of a step, where the cost model expects more time of any


def step_tokens(config: ClaaConfig, cost: Costs, start: int, left: int, chunk: int) -> int:
    """How many of the `left` tokens from `start` on the next step computes: at least 1, at most `chunk`.

    As the operator says, else as many as are expected to take `SECONDS` in the late layers.
    """
    most = max(1, min(left, chunk))
    if config.finish_chunk is not None:
        return min(most, config.finish_chunk)
    low, high = min(LEAST, most), most
    while low < high:  # the most tokens that are expected to be done in time
        middle = (low + high + 1) // 2
        if cost.seconds(step_work(config, start, start + middle)) <= SECONDS:
            low = middle
        else:
            high = middle - 1
    return low


def step_work(config: ClaaConfig, start: int, end: int) -> Work:
    """What tokens [start, end) take in the late layers, beyond launching them."""
    late = config.num_layers - 1 - config.steps[0].prune_layer
    return span_work(late, start, end)._replace(passes=0, eager=0)
