"""Who runs which layers in one forward: a host-side plan, complete before layer 0.

A *level* is a stretch of layers that sees the same rows: level 0 is the early layers (the stock batch), level i the
layers after prune step i. Every number here is a Python int known from lengths alone, so shapes never wait for the
device; which tokens are kept is decided on the device, in `late_pass`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from claa_sglang.requests.state import RequestState


@dataclass(frozen=True, slots=True)
class Segment:
    """One request's rows at one level.

    Attributes:
        request: index of the request in the batch.
        start, end: its rows among the level's rows, in batch order.
        row: its row of the widened request table at this level.
        prefix_len: KV entries of that row written before this forward.
        seq_len: KV entries of that row after this forward.
        state: the request's CLAA state when it is pruned, else None.
        complete: whether every row of the request at this level has been computed after this forward: the whole prompt,
            or all that was kept, and what was generated. Then it has a segment at the next level. True in decode.
        decodes: whether its one row is a generated token, in whichever forward.
    """

    request: int
    start: int
    end: int
    row: int
    prefix_len: int
    seq_len: int
    state: RequestState | None
    complete: bool
    decodes: bool = False

    @property
    def rows(self) -> int:
        """Number of rows this request has at this level."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class KeptSegment(Segment):
    """Generated tokens of one request, in the layers in which these read kept prompt tokens alone.

    Rows are counted among those of `BatchPlan.kept`; `row` is the stock row of a request that reads everything.

    Attributes:
        stale: whether the row is to be listed from the start.
        source: the first of its rows at level 0.
    """

    stale: bool = False
    source: int = 0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """All levels of one forward. `levels[0]` covers every request; later levels leave out pruned requests whose rows at
    the level before are not complete. A segment has no rows where all were computed in earlier forwards, or where the
    step had no room for any. Dense requests have the same rows at every level.

    `kept` are rows of level 0 that read kept tokens in the configuration's `kept_layers`: in decode every row, if one
    request is restricted so; else those generated tokens that are computed among prompts."""

    levels: tuple[tuple[Segment, ...], ...]
    decode: bool
    kept: tuple[KeptSegment, ...] = ()

    def rows(self, level: int) -> int:
        """Number of rows the layers of `level` compute."""
        segments = self.levels[level]
        return segments[-1].end if segments else 0

    @property
    def pruned(self) -> tuple[Segment, ...]:
        """Level-0 segments of the pruned requests: those whose boundary state is stored."""
        return tuple(s for s in self.levels[0] if s.state is not None)

    @property
    def pruned_states(self) -> tuple[RequestState, ...]:
        """States of the pruned requests."""
        return tuple(s.state for s in self.levels[0] if s.state is not None)

    @property
    def only_late(self) -> bool:
        """Whether the early layers have nothing to do, as all they could say of these rows is in the cache: a step of
        finishing, whose requests borrow their late slots."""
        return all(s.state is not None and s.state.progress.borrowed is not None for s in self.levels[0])

    def dense_part(self) -> BatchPlan | None:
        """The same forward with no late rows for pruned requests; None when no dense request is in it.

        Level 0 is unchanged: those rows have run.
        """
        levels = [self.levels[0]]
        for level in self.levels[1:]:
            kept, end = [], 0
            for segment in level:
                if segment.state is None:
                    kept.append(replace(segment, start=end, end=end + segment.rows))
                    end += segment.rows
            levels.append(tuple(kept))
        return BatchPlan(tuple(levels), self.decode) if levels[1] else None


def plan_extend(
    states: Sequence[RequestState | None],
    *,
    rows: Sequence[int],
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
    last_chunk: Sequence[bool],
    table_stride: int,
    num_steps: int,
    decoding: Sequence[bool] | None = None,
) -> BatchPlan | None:
    """Plan a prefill batch; None when no request in it is pruned (the stock path).

    Of a pruned request whose prompt is complete, the late layers compute the rows of its state's `late_spans`; of one
    that decodes, its token.

    Args:
        states: per request, its state; None or a dense state means the stock path.
        rows: per request, its row in the stock request table.
        prefix_lens, extend_lens: per request, tokens before and in this chunk.
        last_chunk: per request, whether the chunk ends its prompt: every token has been, or is, in the early layers.
        table_stride: rows of the stock table; the late row of level i is `row + i * table_stride`.
        num_steps: prune steps of the configuration.
        decoding: per request, whether its one token is a generated one (`--enable-mixed-chunk`); None: of nobody.
    """
    pruned = [s if s is not None and s.pruned else None for s in states]
    if not any(pruned):
        return None
    levels: list[list[Segment]] = [[] for _ in range(num_steps + 1)]
    ends = [0] * (num_steps + 1)
    for i, state in enumerate(pruned):
        seq_len = prefix_lens[i] + extend_lens[i]
        decodes = decoding is not None and decoding[i]
        complete = last_chunk[i] or decodes
        for level in range(num_steps + 1):
            row, prefix, length = rows[i], prefix_lens[i], seq_len
            if state is not None and level > 0:
                if not complete:
                    break
                row += level * table_stride
                whole = late_len(state, level, seq_len)
                prefix, length = (whole - 1, whole) if decodes else state.progress.late_spans[level - 1]
                complete = length == whole
            start, ends[level] = ends[level], ends[level] + length - prefix
            levels[level].append(Segment(i, start, ends[level], row, prefix, length, state, complete, decodes))
    kept = _generated(levels[0], (num_steps + 1) * table_stride)
    return BatchPlan(tuple(tuple(level) for level in levels), decode=False, kept=kept)


def _generated(segments: Sequence[Segment], block: int) -> tuple[KeptSegment, ...]:
    """Of a prefill batch, the tokens that were generated before a retraction or are in a mixed chunk, and decode over
    kept tokens. block: the first row of such rows."""
    found: list[KeptSegment] = []
    for s in segments:
        if s.state is None or s.state.plan.decode_dense_layers is None or s.seq_len <= s.state.plan.prompt_tokens:
            continue
        first = max(s.prefix_len, s.state.plan.prompt_tokens)
        start, rows = found[-1].end if found else 0, s.seq_len - first
        length = late_len(s.state, 1, s.seq_len)
        place = start, start + rows, block + s.row, length - rows, length
        found.append(KeptSegment(s.request, *place, s.state, True, True, stale=True, source=s.end - rows))
    return tuple(found)


def plan_decode(
    states: Sequence[RequestState | None],
    *,
    rows: Sequence[int],
    seq_lens: Sequence[int],
    table_stride: int,
    num_steps: int,
    stale: Sequence[bool] | None = None,
) -> BatchPlan | None:
    """Plan a decode batch, one row per request; None when none is pruned. `seq_lens` count the new token.

    stale: per request, whether its row of kept tokens must be listed from the start; None: of all.
    """
    pruned = [s if s is not None and s.pruned else None for s in states]
    if not any(pruned):
        return None
    levels = []
    for level in range(num_steps + 1):
        segments = []
        for i, state in enumerate(pruned):
            row, length = rows[i], seq_lens[i]
            if state is not None and level > 0:
                row, length = row + level * table_stride, late_len(state, level, length)
            segments.append(Segment(i, i, i + 1, row, length - 1, length, state, True, True))
        levels.append(tuple(segments))
    kept: list[KeptSegment] = []
    for s in levels[0]:
        row, length, is_stale = s.row, s.seq_len, False
        if s.state is not None and s.state.plan.decode_dense_layers is not None:
            row, length = row + (num_steps + 1) * table_stride, late_len(s.state, 1, length)
            is_stale = stale is None or stale[s.request]
        place = s.start, s.end, row, length - 1, length
        kept.append(KeptSegment(s.request, *place, s.state, True, True, stale=is_stale, source=s.start))
    if all(s.row == k.row for s, k in zip(levels[0], kept, strict=True)):
        kept = []
    return BatchPlan(tuple(levels), decode=True, kept=tuple(kept))


def plan_observed(
    states: Sequence[RequestState | None],
    *,
    rows: Sequence[int],
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
    window: int,
) -> tuple[Segment, ...]:
    """Of a prefill batch, the requests that are ranked in it and drop nothing; arguments as for `plan_extend`.

    Those whose prompt ends here and whose last `window` tokens are all among these rows, as their queries rank: a
    prefix hit of stock's may leave fewer.
    """
    found, start = [], 0
    for i, state in enumerate(states):
        end, seq_len = start + extend_lens[i], prefix_lens[i] + extend_lens[i]
        if (
            state is not None
            and state.observed
            and state.progress.kept[0] is None
            and seq_len == state.plan.prompt_tokens
            and extend_lens[i] >= window
        ):
            found.append(Segment(i, start, end, rows[i], prefix_lens[i], seq_len, state, True))
        start = end
    return tuple(found)


def late_len(state: RequestState, level: int, seq_len: int) -> int:
    """Length of a pruned request's late row at `level` >= 1 when its stock row has `seq_len` >= prompt_tokens entries:
    the kept prompt tokens, and every generated token."""
    return state.plan.kept_counts[level - 1] + seq_len - state.plan.prompt_tokens
