"""The same arrivals with the policy and as stock: how many prompt tokens are computed, on SGLang's prefix cache.

`tests/engine/test_new_tokens.py` asks whole servers. Here a step admits all that does not wait, and ends its prefills.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sglang.srt.managers.schedule_batch import Req

from claa_sglang.patches import attached
from claa_sglang.patches.policy import start_step
from claa_sglang.patches.requests import make_dense
from claa_sglang.policy.cost import Constants, CostModel
from claa_sglang.policy.policy import Policy
from tests.fast.patches.test_choose_way import CONFIG, World

# About SmolLM2-135M in float32 on two cores.
TWO_CORES = Constants(per_pass=2e-4, per_row=1.6e-5, per_pair=2e-9, per_prune=2e-3)


class Arrivals(World):
    """Counts what is computed; `stock`: by a server without the policy."""

    def __init__(self, stock: bool) -> None:
        super().__init__()
        self.live.policy = Policy(CONFIG, CostModel(TWO_CORES), 8192)
        self.stock, self.new, self.requests = stock, 0, 0

    def ask(self, *tokens: list[int], n: int = 1, new: int = 8, keep: float = 0.2) -> None:
        """These prompts arrive at once."""
        if n > 1:
            for prompt in tokens:  # as SGLang's tokenizer manager sends them ahead, one after the other
                self.serve([self.request(prompt, n, 0, keep)])
        self.serve([self.request(prompt, n, new, keep) for prompt in tokens for _ in range(n)])

    def serve(self, queue: list[Req]) -> None:
        self.requests += len(queue)
        while queue:
            start_step(self.tree)
            if self.stock:
                for req in queue:
                    make_dense(req, "stock")
            waiting = [req for req in queue if self.admit(req) == "waits"]
            admitted = [req for req in queue if req not in waiting]
            for req in admitted:
                pruned = attached.state.of(req).pruned
                length = len(req.origin_input_ids)
                self.new += length - min(req.prefix_len, length - (CONFIG.window if pruned else 1))
                req.output_ids.append(1)
            for req in admitted:
                self.cache(list(req.origin_input_ids), attached.state.of(req).pruned)
            assert admitted
            queue = waiting


def prompt(length: int, name: int = 1) -> list[int]:
    return [name] * length


def several(s: Arrivals, *calls: tuple[list[list[int]], dict]) -> None:
    for prompts, known in calls:
        s.ask(*prompts, **known)


ARRIVALS: dict[str, Callable[[Arrivals], None]] = {
    "8 samples": lambda s: s.ask(prompt(1500), n=8),
    "8 samples, keep 0.05": lambda s: s.ask(prompt(1500), n=8, keep=0.05),
    "4 samples of two prompts": lambda s: s.ask(prompt(300), prompt(500, 2), n=4),
    "a chat's 8 samples": lambda s: s.ask(prompt(430), n=8),
    "a chat's 8 samples, keep 0.4": lambda s: s.ask(prompt(430), n=8, keep=0.4),
    "one, then 7 equal ones": lambda s: several(s, ([prompt(400)], {}), ([prompt(400)] * 7, {})),
    "one, then 7 equal ones, keep 0.4": lambda s: several(s, ([prompt(400)], {}), ([prompt(400)] * 7, {"keep": 0.4})),
    "7 equal ones": lambda s: s.ask(*[prompt(400)] * 7),
    "four times in turn": lambda s: several(s, *[([prompt(400)], {})] * 4),
    "fork": lambda s: several(
        s, ([prompt(600)], {"new": 0}), ([prompt(600) + prompt(10, 2 + branch) for branch in range(8)], {})
    ),
    "agents over one document": lambda s: several(
        s,
        ([prompt(1200) + prompt(20, 2)], {}),
        ([prompt(1200) + prompt(20, 3 + agent) for agent in range(7)], {}),
    ),
    "three turns": lambda s: several(s, *[([prompt(1500 + 200 * turn)], {}) for turn in range(3)]),
}


@pytest.mark.parametrize("name", ARRIVALS)
def test_no_more_new_tokens_than_stock(name: str) -> None:
    """A pruned request computes its window anew, where stock computes one token."""
    stock, plugin = Arrivals(stock=True), Arrivals(stock=False)
    for server in (stock, plugin):
        ARRIVALS[name](server)
    assert plugin.new <= stock.new + CONFIG.window * stock.requests
