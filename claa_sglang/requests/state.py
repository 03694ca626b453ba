"""What CLAA knows about one request, kept on SGLang's request object for as long as the request lives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from claa_sglang.config.budget import kept_count
from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.ranking.spec import RankerSpec, parse
from claa_sglang.requests.dense_rules import OBSERVED
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.step_scores import StepScores

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
FAILED = "CLAA failed while"  # begins the error of a request that CLAA ended


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What is settled when the scheduler builds a request. A request that turns dense gets another plan.

    Attributes:
        options: what the client asked for.
        prompt_tokens: length N of the prompt; generated tokens are not counted, also after a retraction.
        steps: the prune steps, with the request's own keep rate.
        kept_counts: per step, how many prompt tokens go on. Known from N alone, so no shape waits for the device.
        ranker: what ranks its tokens.
        dense_reason: why the request runs dense; None when it is pruned.
        decode_dense_layers: first layers in which its generated tokens read the whole prompt; from there to the first
            prune they read what that kept. None: no layer is restricted, or nothing is dropped.
    """

    options: RequestOptions
    prompt_tokens: int
    steps: tuple[PruneStep, ...] = ()
    kept_counts: tuple[int, ...] = ()
    ranker: RankerSpec = field(default_factory=RankerSpec)
    dense_reason: str | None = None
    decode_dense_layers: int | None = None


@dataclass(slots=True)
class Progress:
    """What has been computed of a pruned request: changed by admission, late slots and the forward.

    Attributes:
        kept: per step, the kept prompt positions: int64 `[kept_counts[i]]`, ascending; None until ranked. A retracted
            request resumes with the positions it had, so its answer does not change.
        late_computed_tokens: prompt rows that ran through the first late layer.
        late_spans: per step, the rows [start, end) after it that the forward being scheduled computes: of its kept
            prompt tokens, then those generated before a retraction. A long late prefill takes several forwards; rows
            after a step begin when those before it are complete. (0, 0) until they begin.
        last_slots: between the parts of a late prefill, the slots (int64 `[n]`) that have early KV and boundary states
            of the prompt's last page; late slots own them.
        explained: per step, what `options.explain` asks for; None until ranked, and where nothing is ranked.
        borrowed: slots (int64 `[kept_counts[0]]`) that serve as late slots and belong to somebody else, in a step of
            finishing (`patches/finishing.py`). None for a request of a client, whose late slots are taken and freed.
        listed: what its row of kept tokens was listed from: (stock row, tokens of it that are the prefix cache's), as
            stock lists the cache's slots in place of the request's own when it caches a prompt. None before that.
        error: what went wrong in this request's own computation; the scheduler ends it with this text.
    """

    kept: list[Tensor | None] = field(default_factory=list)
    explained: list[StepScores | None] = field(default_factory=list)
    late_computed_tokens: int = 0
    late_spans: list[tuple[int, int]] = field(default_factory=list)
    last_slots: Tensor | None = None
    borrowed: Tensor | None = None
    listed: tuple[int, int] | None = None
    error: str | None = None

    @classmethod
    def before_any(cls, steps: int) -> Progress:
        """Of a request of which nothing was computed."""
        return cls(kept=[None] * steps, explained=[None] * steps, late_spans=[(0, 0)] * steps)

    def reset_scheduling(self) -> None:
        """The late slots are given back, in a retraction too: the late prefill is scheduled from its start. What was
        ranked and what failed stays."""
        self.late_spans = [(0, 0)] * len(self.late_spans)
        self.last_slots = self.listed = None

    def fail(self, doing: str, error: Exception) -> None:
        """Have this request end with an error. The first failure is the cause; what follows from it is only logged."""
        self.error = self.error or f"{FAILED} {doing}: {type(error).__name__}: {error}"
        logger.error("CLAA failed while %s", doing, exc_info=error)


@dataclass(slots=True)
class Decision:
    """What the policy makes of a request that waits: changed where a step is made, until it has its row.

    Attributes:
        is_open: whether the policy still decides on the request, which way it goes and in which step.
        waits: whether it is not to run in the step that is being made, as another computes its prefix.
        why: why the policy prunes it, or runs it dense; None where nothing was chosen.
        uses: what the policy knows of its cached tokens (`policy.prefix_uses.Uses`); None until the prompt was counted.
        dense_new_tokens: (max_new_tokens, min_new_tokens) of a dense request, where a pruned one's were cut to fit.
        finished: first prompt tokens that were pruned in the prefix cache, and were made dense since; None until the
            prompt was looked at.
    """

    is_open: bool = False
    waits: bool = False
    why: str | None = None
    uses: Any = None
    dense_new_tokens: tuple[int, int] | None = None
    finished: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RequestState:
    """One request's plan and outcome, in the scheduler process."""

    plan: RequestPlan
    progress: Progress = field(default_factory=Progress)
    decision: Decision = field(default_factory=Decision)

    @property
    def observed(self) -> bool:
        """Whether it takes the stock path, and its prompt is ranked for its report. Its plan has prune steps."""
        return not self.pruned and bool(self.plan.steps)

    def last_rows(self, window: int) -> int:
        """Tokens that the last chunk of its prompt must have: the `window` that ranks, or the one that is explained."""
        return max(window, self.plan.options.explain_window or 0)

    @property
    def pruned(self) -> bool:
        """Whether late layers see only the kept tokens. False means: the stock path, untouched."""
        return self.plan.dense_reason is None

    @classmethod
    def pruned_request(cls, options: RequestOptions, config: ClaaConfig, prompt_tokens: int) -> RequestState:
        """State of a request that is pruned as `config` says, or as the request itself asks."""
        steps = config.steps if options.keep_rate is None else config.with_keep_rate(options.keep_rate).steps
        counts = tuple(kept_count(prompt_tokens, s.keep_rate, config.window) for s in steps)
        if options.keep is not None:
            counts = (len(given_positions(options.keep, prompt_tokens, config.window)),) * len(steps)
        asked, layers = options.decode_dense_layers, config.kept_layers
        restricted = layers and (asked is None or asked in layers) and counts[0] < prompt_tokens
        return cls(
            RequestPlan(
                options,
                prompt_tokens,
                steps,
                counts,
                parse(options.ranker or config.ranker),
                decode_dense_layers=layers.start if restricted else None,
            ),
            Progress.before_any(len(steps)),
            # Positions that a client gives are its own choice of what is kept.
            Decision(is_open=(options.policy or config.policy) == "auto" and options.keep is None),
        )

    @classmethod
    def observed_request(cls, options: RequestOptions, config: ClaaConfig, prompt_tokens: int) -> RequestState:
        """State of a request that would be pruned, of a server that observes."""
        state = cls.pruned_request(options, config, prompt_tokens)
        return cls(replace(state.plan, dense_reason=OBSERVED, decode_dense_layers=None), state.progress)

    @classmethod
    def dense_request(cls, options: RequestOptions, prompt_tokens: int, reason: str) -> RequestState:
        """State of a request that takes the stock path because of `reason`."""
        return cls(RequestPlan(options, prompt_tokens, dense_reason=reason))


def given_positions(keep: Sequence[int], prompt_tokens: int, window: int) -> list[int]:
    """What is kept of a prompt where a client says so: its positions, ascending, the first token and the window.

    The first token because late layers without it are another model, see `ranking.selection.select`.
    """
    tail = range(max(0, prompt_tokens - window), prompt_tokens)
    first = [0] if tail.start > 0 and (not keep or keep[0] > 0) else []
    return first + [position for position in keep if position < tail.start] + list(tail)


@contextmanager
def contain(states: Iterable[RequestState], doing: str) -> Iterator[None]:
    """A failure inside ends these requests with an error, and nothing else: not their batch, not the server."""
    try:
        yield
    except Exception as error:
        for state in states:
            state.progress.fail(doing, error)
