"""Prune only where it pays (`--claa-policy auto`): dense over its dense hit, or pruned over its pruned hit.

Pruned and dense requests have prefixes of their own in the cache, so a choice binds those who come later. The cheaper
way now is not always the cheaper way in the end: a conversation that starts pruned would pay late layers over its whole
kept history in every turn, where stock pays its new tokens only. So where a pruned prefix is used again, going dense
once, to be dense and cached from then on, is weighed against going on pruned as often as this prefix is likely to be
used: at least `EXPECTED_USES` times, and as often as it was used already (the ski-rental rule, which pays at most about
twice what the best choice in hindsight would have). A prompt that nobody has followed up yet is followed up in a share
`CONTINUED` of cases, and is pruned only if it gains more than that will cost: a chat's short first turn stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from claa_sglang.config.budget import kept_counts
from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.policy.cost import CostModel, Work, prefill_work, pruned_work
from claa_sglang.policy.prefix_uses import PrefixUses

EXPECTED_USES = 10
CONTINUED = 0.3  # prior: how many prompts are the beginning of a conversation
MARGIN = 0.95  # pruned must be expected below this share of dense: estimates are no better than that


class Hits(NamedTuple):
    """Prompt tokens that are in the prefix cache, as dense and as pruned requests left them there."""

    dense: int
    pruned: int


class Choice(NamedTuple):
    """Whether to prune, and why, for the report."""

    prune: bool
    reason: str


class Policy:
    """Chooses for one server.

    Args:
        config: the server's configuration.
        cost: expected times, refined by the caller.
        chunk: tokens of a prefill chunk.
        graph_tokens: how many tokens of dense requests a CUDA graph computes at most, 0 without graphs. A pruned
            forward runs eagerly: in a model so small that launching takes longest, that costs more than it gains.
    """

    def __init__(
        self, config: ClaaConfig, cost: CostModel, chunk: int, graph_tokens: Callable[[], int] = lambda: 0
    ) -> None:
        self.cost = cost
        self._config = config
        self._chunk = chunk
        self._graph_tokens = graph_tokens
        self._uses = PrefixUses()

    def note(self, tokens: Sequence[int], key: str, hits: Hits) -> float:
        """Count a prompt; returns how many before it had the tokens of it that are cached as pruned, on average."""
        return self._uses.note(tokens, key, hits.pruned)

    def choose(self, tokens: int, steps: Sequence[PruneStep], hits: Hits, uses: Callable[[], float]) -> Choice:
        """The way for a prompt of `tokens` tokens, to be pruned in `steps`.

        uses: what `note` returns for it; called where it matters, as it reads the whole prompt.
        """
        dense = self.cost.seconds(self._dense(hits.dense, tokens))
        pruned = self.cost.seconds(self._pruned(steps, hits.pruned, tokens))
        estimates = f"pruned {_ms(pruned)}, dense {_ms(dense)} (estimated)"
        if pruned > MARGIN * dense:
            return Choice(False, f"dense is not slower: {estimates}")
        if not hits.pruned:
            # What a follow-up would cost more: a little in each of its turns, or this prompt once more, dense.
            turns = EXPECTED_USES * self._regret(tokens, self._config.window, steps, 1)
            later = CONTINUED * min(dense, turns)
            if later > dense - pruned:
                return Choice(False, f"dense, cached for later: {estimates}, later turns pruned {_ms(later)} more")
        before = uses()
        if hits.pruned:
            expected = max(EXPECTED_USES, before)
            extra = expected * self._regret(tokens, tokens - hits.pruned, steps, expected)
            if extra > dense - pruned:
                return Choice(False, f"dense once, cached for later: {estimates}, later turns pruned {_ms(extra)} more")
        return Choice(True, f"pruned is faster: {estimates}")

    def _regret(self, tokens: int, new: int, steps: Sequence[PruneStep], expected: float) -> float:
        """What pruning costs more than dense in an average later turn, both with their history cached.

        Turns are taken to bring `new` tokens each, so the average of `expected` turns has half of theirs more.
        """
        tokens += int(new * expected / 2)
        start = tokens - new
        dense, pruned = self._dense(start, tokens), self._pruned(steps, start, tokens)
        return self.cost.seconds(pruned) - self.cost.seconds(dense)

    def _dense(self, hit: int, tokens: int) -> Work:
        return prefill_work(self._config.num_layers, hit, tokens, self._chunk, self._graph_tokens())

    def _pruned(self, steps: Sequence[PruneStep], hit: int, tokens: int) -> Work:
        kept = kept_counts(tokens, (step.keep_rate for step in steps), self._config.window)
        prunes = [step.prune_layer for step in steps]
        return pruned_work(prunes, kept, self._config.num_layers, hit, tokens, self._chunk)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
