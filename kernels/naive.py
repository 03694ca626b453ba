"""The CLAA ranking as plain loops in fp64: slow, obviously right, the reference for every faster version.

`window_scores` and `window_peaks` are steps 1 to 4 (compare scoring.py), `rank` and `select` are steps 5 and 6, with
`carry` between them (compare claa_sglang/ranking/). `window_mass`, `fold`, `store` and `load` are those of a batch
(compare window_attention.py, fold.py and rows.py). Same signatures, same shapes, same answers in the corner cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from claa_sglang.kernels.layout import Row


def window_scores(q: Tensor, k: Tensor, *, scaling: float, pool_kernel: int) -> Tensor:
    """q [W, heads, d], k [N, kv_heads, d], N > W -> fp32 [kv_heads, N-W]; see scoring.window_scores."""
    ranked = k.shape[0] - q.shape[0]
    out = torch.zeros(k.shape[1], ranked, dtype=torch.float64)
    for kv_head, looks in _looks(q, k, scaling):
        mass = [math.fsum(column) for column in zip(*looks, strict=True)]
        for position, pooled in enumerate(_average_pool(mass, pool_kernel)):
            out[kv_head, position] += pooled
    return out.float().to(q.device)


def window_peaks(q: Tensor, k: Tensor, *, scaling: float) -> Tensor:
    """q [W, heads, d], k [N, kv_heads, d], N > W -> fp32 [kv_heads, N-W]; see scoring.window_peaks."""
    out = torch.zeros(k.shape[1], k.shape[0] - q.shape[0], dtype=torch.float64)
    for kv_head, looks in _looks(q, k, scaling):
        for position, column in enumerate(zip(*looks, strict=True)):
            # A maximum of Python passes over NaN: a query that failed must show.
            failed = any(math.isnan(weight) for weight in column)
            highest = math.nan if failed else max(*column, float(out[kv_head, position]))
            if not math.isnan(float(out[kv_head, position])):
                out[kv_head, position] = highest
    return out.float().to(q.device)


def _looks(q: Tensor, k: Tensor, scaling: float) -> Iterator[tuple[int, list[list[float]]]]:
    """Of each query head its KV head, and what each query of the window gives to each token before the window."""
    window, heads, _ = q.shape
    ranked = k.shape[0] - window
    q64, k64 = q.double().cpu(), k.double().cpu()
    for head in range(heads):
        kv_head = head // (heads // k.shape[1])
        looks = []
        for row in range(window):
            visible = ranked + row + 1  # the query at ranked + row sees itself and what is before it
            logits = scaling * (k64[:visible, kv_head] @ q64[row, head])
            weights = torch.exp(logits - logits.max())
            looks.append((weights / weights.sum())[:ranked].tolist())
        yield kv_head, looks


def _average_pool(values: list[float], kernel: int) -> list[float]:
    """Stride 1; positions beyond either end count as zeros, so the divisor is always `kernel`."""
    half = kernel // 2
    return [math.fsum(values[max(0, i - half) : i + half + 1]) / kernel for i in range(len(values))]


def rank(scores: Sequence[Tensor]) -> Tensor:
    """Per-layer scores [kv_heads, N-W] -> fp32 [N-W]; see ranking.rank."""
    best = [-math.inf] * scores[0].shape[1]
    for layer_scores in scores:
        for row in layer_scores.double().tolist():
            for position, z in enumerate(_z_scores(row)):
                best[position] = max(best[position], z)
    return torch.tensor(best, dtype=torch.float32, device=scores[0].device)


def _z_scores(row: list[float]) -> list[float]:
    if not all(math.isfinite(score) for score in row):
        return [-math.inf] * len(row)
    if len(row) == 1:
        return [0.0]
    mean = math.fsum(row) / len(row)
    variance = math.fsum((score - mean) ** 2 for score in row) / (len(row) - 1)
    return [(score - mean) / (math.sqrt(variance) + 1e-8) for score in row]


def carry(ranking: Tensor, loss: float) -> Tensor:
    """ranking [M] -> fp32 [M]; see carry.carry."""
    values = [-math.inf if math.isnan(value) else value for value in ranking.tolist()]
    best_first = sorted(range(len(values)), key=lambda position: (-values[position], position))
    strength = {position: math.log(len(values) / (place + 1)) for place, position in enumerate(best_first)}
    carried = [max(strength[j] - loss * (i - j) for j in range(i + 1)) for i in range(len(values))]
    return torch.tensor(carried, dtype=torch.float32, device=ranking.device)


def select(ranking: Tensor, prompt_tokens: int, kept: int, window: int) -> Tensor:
    """ranking [N-W] -> int64 [kept], ascending; see ranking.select."""
    first_of_window = max(0, prompt_tokens - window)
    chosen = set(range(first_of_window, prompt_tokens))
    values = [-math.inf if math.isnan(value) else value for value in ranking.tolist()]
    # The first token goes before all others.
    by_rank = sorted(range(first_of_window), key=lambda position: (position > 0, -values[position], position))
    for position in by_rank:
        if len(chosen) < kept:
            chosen.add(position)
    return torch.tensor(sorted(chosen), dtype=torch.int64, device=ranking.device)


def window_mass(
    q: Tensor,
    key_buffer: Tensor,
    table: Tensor,
    requests: Tensor,
    *,
    window: int,
    scaling: float,
    queries: int | None = None,
    peaks: bool = False,
) -> Tensor:
    """fp32 [kv_heads * positions]; see window_attention.window_mass."""
    queries = queries or window
    parts, rows = [], requests.tolist()
    for first_row, table_row, tokens in zip(rows[Row.FIRST_ROW], rows[Row.TABLE_ROW], rows[Row.TOKENS], strict=True):
        keys = key_buffer[table[table_row, :tokens].long()]
        last = q[first_row + window - queries : first_row + window]
        if peaks:
            found = window_peaks(last, keys, scaling=scaling)
        else:
            found = window_scores(last, keys, scaling=scaling, pool_kernel=1)
        parts.append(found[:, : tokens - window].flatten())
    return torch.cat(parts)


def fold(mass: Tensor, requests: Tensor, ranking: Tensor, *, window: int, pool_kernel: int, first_layer: bool) -> None:
    """In place, of the same device; see fold.fold."""
    kv_heads = mass.numel() // ranking.numel()
    for tokens, before in requests[[Row.TOKENS, Row.BEFORE]].T.tolist():
        ranked = tokens - window
        rows = mass[kv_heads * before : kv_heads * (before + ranked)].view(kv_heads, ranked)
        pooled = torch.tensor([_average_pool(row, pool_kernel) for row in rows.tolist()], dtype=torch.float64)
        own = ranking[before : before + ranked]
        new = rank([pooled]).to(own.device)
        own.copy_(new if first_layer else torch.maximum(own, new))


def store(
    buffers: Sequence[Tensor], counts: Sequence[int], slots: Tensor, hidden: Tensor, residual: Tensor, *, is_pair: bool
) -> None:
    """Write states into the first `counts` elements of the buffers' slots; see rows.store."""
    for slot, left, right in zip(slots.tolist(), hidden, residual, strict=True):
        state, first = torch.cat((left, right)) if is_pair else left + right, 0
        for buffer, count in zip(buffers, counts, strict=True):
            buffer[slot].view(-1)[:count] = state[first : first + count]
            first += count


def load(
    buffers: Sequence[Tensor], counts: Sequence[int], slots: Tensor, hidden: Tensor, residual: Tensor, *, is_pair: bool
) -> None:
    """Read the states of `slots` into hidden and residual; see rows.load."""
    for slot, left, right in zip(slots.tolist(), hidden, residual, strict=True):
        state = torch.cat([buffer[slot].view(-1)[:count] for buffer, count in zip(buffers, counts, strict=True)])
        left.copy_(state[: left.shape[0]])
        right.copy_(state[left.shape[0] :] if is_pair else torch.zeros_like(right))
