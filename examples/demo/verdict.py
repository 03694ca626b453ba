"""What the demo's times say in words: the gain on a cold prompt, the cost on a follow-up, and both in one sentence."""

from __future__ import annotations

from typing import NamedTuple

NO_GAIN = 0.98  # above it, pruned against dense on the cold prompt is noise or worse


class Times(NamedTuple):
    """Median milliseconds to the first token of one question, dense and pruned."""

    dense: float
    pruned: float

    @property
    def ratio(self) -> float:
        """Pruned, as a share of dense; below 1 where pruning is faster."""
        return self.pruned / self.dense


def gain(cold: Times, prompt_tokens: int, kept_tokens: int, prune_layer: int) -> str:
    """The cold prompt: nothing of it is cached, and only `kept_tokens` go past `prune_layer`."""
    return (
        f"{kept_tokens:,} of {prompt_tokens:,} tokens went past layer {prune_layer}, and the first token came "
        f"after {_against(cold)}."
    )


def cost(follow_up: Times, cached_tokens: int, prompt_tokens: int) -> str:
    """The follow-up: its text is cached for both, but a pruned request ranks it again for the new question."""
    return (
        f"{cached_tokens:,} of {prompt_tokens:,} tokens were cached. Dense computes the rest; pruned also ranks the "
        f"whole text again for the new question and runs the late layers for it: {_against(follow_up)}."
    )


def sentence(cold: Times, follow_up: Times) -> str:
    """Both in one sentence, which never calls a loss a gain."""
    saved, paid = cold.dense - cold.pruned, follow_up.pruned - follow_up.dense
    if cold.ratio > NO_GAIN:
        text = f"Pruning did not pay in this run: {_lost_or_saved(-saved)} on the cold prompt"
        return f"{text} and {_lost_or_saved(paid)} on the follow-up. Is the machine busy with something else?"
    text = f"Pruning saved {saved:,.0f} ms ({1 - cold.ratio:.0%}) on the cold prompt and"
    if paid <= 0:
        return f"{text} {-paid:,.0f} ms on the follow-up."
    return f"{text} cost {paid:,.0f} ms on the follow-up: {_worth(saved / paid)}."


def _lost_or_saved(paid: float) -> str:
    return f"{paid:,.0f} ms lost" if paid > 0 else f"{-paid:,.0f} ms saved"


def _worth(follow_ups: float) -> str:
    """When pruning pays, given how many follow-ups cost what one cold prompt saves."""
    if follow_ups < 1:
        return "it pays where a text is asked about once"
    return f"it pays while a text has at most {int(follow_ups)} follow-up{'s' if follow_ups >= 2 else ''}"


def _against(times: Times) -> str:
    return f"{times.pruned:,.0f} ms pruned, {times.dense:,.0f} ms dense ({times.ratio:.2f} of dense)"
