"""Prune only where it pays (`--claa-policy auto`): dense over its dense hit, or pruned over its pruned hit.

Pruned and dense requests have prefixes of their own in the cache, so a choice binds those who come later. The cheaper
way now is not always the cheaper way in the end: a conversation that stays pruned would pay late layers over its whole
kept history in every turn, where stock pays its new tokens only. So where a pruned prefix is used again, going dense
once, to be dense and cached from then on, is weighed against going on pruned as often as this prefix was used already
(the ski-rental rule, which pays at most about twice what the best choice in hindsight would have): the same prompt
again, or another question over a text, is charged for what it was. A prompt that goes on where another and its answer
ended is a conversation, which is expected to have more turns: it goes dense while that is cheap. A prompt that nobody
followed up yet is followed up in a share `CONTINUED` of cases, and is pruned only if it gains more than that will cost:
a chat's short first turn stays dense.

What is being computed counts as cached: a prefix is computed once, not by everybody who arrives before it is there.
Who would compute most of it again waits for it, as long as that takes; who has the prefix as pruned goes on pruned,
or waits where the dense prefix is there after this step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from claa_sglang.config.budget import kept_counts
from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.policy.cost import Costs, Work, prefill_work, pruned_work
from claa_sglang.policy.prefix_uses import PrefixUses, Uses

EXPECTED_USES = 10  # of a conversation's history, by its further turns
CONTINUED = 0.3  # prior: how many prompts are the beginning of a conversation
MARGIN = 0.95  # pruned must be expected below this share of dense: estimates are no better than that
NEW = 0.1  # with less than this share of it cached as pruned (a system prompt), a prompt is one that nobody followed up
WAIT = 32  # tokens that waiting must save, at least: what SGLang takes for a shared prefix among waiting requests


class Hits(NamedTuple):
    """Prompt tokens that are in the prefix cache, as dense and as pruned requests left them there."""

    dense: int
    pruned: int


class Flight(NamedTuple):
    """Prompt tokens that will be in the prefix cache as prefills under way get there.

    soon: the dense ones will be after the step that is being made.
    """

    dense: int = 0
    pruned: int = 0
    soon: bool = False


class Choice(NamedTuple):
    """Whether to prune, and why, for the report. wait: not in this step, as its prefix is being computed."""

    prune: bool
    reason: str
    wait: bool = False


class Prompt(NamedTuple):
    """A prompt to choose for.

    tokens: its length. steps: how it would be pruned.
    uses: what is known of its cached beginning (`Policy.note`); called where it matters, as it reads the whole prompt.
    samples: how many answers to it the client asked for (`n`).
    answers: whether it generates anything. One that does not was sent to be cached, for those who follow.
    lasting: whether what is computed for it is cached at all.
    way: what was chosen for its other samples; None for a request that is decided on by itself.
    finished: first tokens of it that were pruned in the cache, and were made dense while the server was idle.
    """

    tokens: int
    steps: Sequence[PruneStep]
    hits: Hits
    uses: Callable[[], Uses] = lambda: Uses(0.0)
    flight: Flight = Flight()
    samples: int = 1
    answers: bool = True
    lasting: bool = True
    way: Choice | None = None
    finished: int = 0


class Policy:
    """Chooses for one server.

    Args:
        config: the server's configuration.
        cost: expected times, refined by the caller.
        chunk: tokens of a prefill chunk.
        graph_tokens: how many tokens of dense requests a CUDA graph computes at most, 0 without graphs. A pruned
            forward runs eagerly: in a model so small that launching takes longest, that costs more than it gains.
        finished_share: of the prefixes that pruned requests leave, those that are made dense before they are used
        again, 0 to 1. Those cost the next request nothing.
    """

    def __init__(
        self,
        config: ClaaConfig,
        cost: Costs,
        chunk: int,
        graph_tokens: Callable[[], int] = lambda: 0,
        finished_share: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self.cost = cost
        self._config = config
        self._chunk = chunk
        self._graph_tokens = graph_tokens
        self._finished_share = finished_share
        self._uses = PrefixUses()

    def note(self, tokens: Sequence[int], key: str, hits: Hits, step: int, answers: bool = True) -> Uses:
        """Count a prompt; returns what is known of the tokens of it that are cached as pruned.

        step: number of the scheduling step. answers: whether it generates anything.
        """
        return self._uses.note(tokens, key, hits.pruned, step, answers)

    def choose(self, prompt: Prompt) -> Choice:
        """The way for a prompt, and whether to wait for what is being computed of it."""
        hits, flight = prompt.hits, prompt.flight
        soon = Hits(max(hits.dense, flight.dense), max(hits.pruned, flight.pruned))
        choice = self._decide(prompt, soon)
        if (soon.pruned if choice.prune else soon.dense) == (hits.pruned if choice.prune else hits.dense):
            return choice
        left_now = prompt.tokens - max(hits)
        left_then = prompt.tokens - (soon.pruned if choice.prune else soon.dense)
        if left_now >= 2 * left_then and left_now - left_then >= WAIT:
            return choice._replace(wait=True)
        if not choice.prune and prompt.way is None and 2 * hits.pruned >= prompt.tokens <= 2 * flight.dense:
            # Most of it is in the cache as pruned, and is being computed dense: once is enough.
            dense, pruned = self._both(prompt, hits)
            if flight.soon:
                return choice._replace(wait=True)
            if pruned <= MARGIN * dense:
                reason = f"pruned is faster: {_estimates(pruned, dense)}, while its prefix is being computed dense"
                return Choice(True, reason)
        return self._decide(prompt, hits)

    def _decide(self, prompt: Prompt, hits: Hits) -> Choice:
        """The way for a prompt with these hits."""
        tokens, steps = prompt.tokens, prompt.steps
        if prompt.way is not None:
            return prompt.way
        dense, pruned = self._both(prompt, hits)
        estimates = _estimates(pruned, dense)
        if pruned > MARGIN * dense:
            if prompt.finished and hits.dense:
                return Choice(False, f"{_was_finished(prompt.finished)}: {estimates}")
            return Choice(False, f"dense is not slower: {estimates}")
        if not prompt.lasting:
            return Choice(True, f"pruned is faster: {estimates}, and nothing is cached for later")
        # What going pruned costs more later, where it is not made dense before. Samples are certain to come, and go
        # this prompt's way.
        left = 1.0 - self._finished_share()
        one = self._regret(tokens, self._config.window, steps, 1)
        samples = prompt.samples * one if prompt.samples > 1 else 0.0
        if hits.pruned < NEW * tokens:
            # A follow-up costs a little in each of its turns, or this prompt once more, dense.
            likely = CONTINUED if prompt.answers or samples else 1.0
            later = samples + left * likely * min(dense, EXPECTED_USES * one)
            if later > dense - pruned:
                return Choice(False, f"dense, cached for later: {estimates}, later turns pruned {_ms(later)} more")
        known = prompt.uses()
        if hits.pruned:
            expected = max(EXPECTED_USES if known.continued else 1.0, known.before)
            extra = max(samples, left * expected * self._regret(tokens, tokens - hits.pruned, steps, expected))
            if extra > dense - pruned:
                return Choice(False, f"dense once, cached for later: {estimates}, later turns pruned {_ms(extra)} more")
        return Choice(True, f"pruned is faster: {estimates}")

    def follows(self, tokens: int, steps: Sequence[PruneStep], hits: Hits, finished: int) -> str | None:
        """Why a prompt that is pruned at any price goes dense after a finished prefix; None where it does not.

        finished: first tokens of it that were finished. Rows are compared, not times: whoever asks for pruning at any
        price wants no estimates, and gets the same answer on every machine.
        """
        dense = self._dense(min(hits.dense, finished), tokens).rows
        if hits.dense and dense <= self._pruned(steps, hits.pruned, tokens).rows:
            return f"{_was_finished(finished)}: dense computes less"
        return None

    def _both(self, prompt: Prompt, hits: Hits) -> tuple[float, float]:
        """Seconds of a prompt dense, and pruned."""
        dense, pruned = self._dense(hits.dense, prompt.tokens), self._pruned(prompt.steps, hits.pruned, prompt.tokens)
        return self.cost.seconds(dense), self.cost.seconds(pruned)

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


def _was_finished(tokens: int) -> str:
    return f"its first {tokens} tokens were finished while the server was idle"


def _estimates(pruned: float, dense: float) -> str:
    return f"pruned {_ms(pruned)}, dense {_ms(dense)} (estimated)"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"
