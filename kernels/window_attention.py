"""Attention the last prompt queries give to every earlier token, from paged keys (steps 1 and 2), in Triton.

The scoring of CLAA (arXiv 2602.16054) without its pooling, for every request of a batch at once; fold.py does the rest.
scoring.py is the same in torch for one request, naive.py with plain loops.

K is read twice and V never: once for the log-sum-exp, once for the probabilities. A caller that has the log-sum-exp
passes it in, and the first reading is left out: paged_lse.py takes it from FlashInfer. On an H100 that is 7 to 18 %
slower (docs/results/scorers.md); on another card `--claa-scorer auto` measures both at start.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from claa_sglang.kernels.layout import Row

# Triton reads globals that are constexpr only.
_FIRST_ROW = tl.constexpr(int(Row.FIRST_ROW))
_TABLE_ROW = tl.constexpr(int(Row.TABLE_ROW))
_TOKENS = tl.constexpr(int(Row.TOKENS))
_BEFORE = tl.constexpr(int(Row.BEFORE))
# Query rows (window x GQA group) of one tile, at most. fp32 products are made in registers, without tensor cores.
_MAX_ROWS = 64
_MAX_ROWS_FP32 = 16
# Bytes of one tile of keys: two in flight leave room for other programs on any GPU since sm80.
_TILE_BYTES = 16384
# Rows of one program of the merge.
_MERGE_ROWS = 16
_QUERY_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def window_mass(
    q: Tensor,
    key_buffer: Tensor,
    table: Tensor,
    requests: Tensor,
    *,
    window: int,
    scaling: float,
    max_tokens: int,
    positions: int,
    queries: int | None = None,
    peaks: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention mass of each token before the window, per KV head, not pooled; or the largest weight of any query.

    For a request of N tokens, its last `queries` = Q of them, and query heads h of a KV head's group:
        lse[h, w] = log sum over n <= N-Q+w of exp(scaling * q[w, h] . k[n])
        mass[n]   = sum over h and w of exp(scaling * q[w, h] . k[n] - lse[h, w])         for n < N-W
        peak[n]   = maximum instead of the sum

    Args:
        q: post-RoPE queries `[rows, heads, d]`, all rows of the batch; any strides, the last one 1.
        key_buffer: post-RoPE keys `[slots, kv_heads, d]` of the same dtype (bf16, fp16 or fp32), or fp8 e4m3, which any
            of these holds exactly; likewise. heads is a multiple of kv_heads.
        table: int32 `[table rows, columns]`, last stride 1: the slots of a request's tokens, in any order.
        requests: int32 `[4, R]`, contiguous, R > 0; see layout.py.
        window: W > 0, tokens at the end that get no value. Every N is larger; nothing checks that.
        scaling: factor on the logits, with that of fp8 keys.
        max_tokens: the largest N.
        positions: the sum of N-W over all requests.
        queries: Q, 1 to W; None for W.
        peaks: the maximum over queries and group instead of the sum.
        lse: fp32 `[R, kv_heads, Q * group]`, contiguous, where it is known already: lse[h, w] to the base 2, that is
            times log2(e), with h = kv_head * group + g at `[request, kv_head, w * group + g]`. None computes it.

    Returns:
        fp32 `[kv_heads * positions]`: the `[kv_heads, N-W]` of each request, one after the other.

    A request's values depend on its own numbers alone, not on the rest of the batch. A non-finite logit makes the
    values of its whole KV head NaN, except -inf, whose weight is 0. With `lse`, a broken key's own value is NaN, and
    those of others are what `lse` makes of them.

    Three launches: partial log-sum-exp, grid (row tiles * splits, kv_heads, R); its merge, grid (rows / 16, kv_heads,
    R); mass, grid (tiles of keys, kv_heads, R). With `lse`, the last one alone. Products in the input dtype with fp32
    sums (fp32 input: no TF32), the rest in fp32, no atomics. Never waits for the GPU. Allocates the result and at most
    1028 bytes for each request, query head and query: no more for a longer prompt.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    rows, heads, dim = q.shape
    _, kv_heads, k_dim = key_buffer.shape
    _check(q, key_buffer, table, requests, window)
    if heads % kv_heads or dim != k_dim or not window < max_tokens or positions < 1:
        raise ValueError(
            f"window_mass: q {tuple(q.shape)}, keys {tuple(key_buffer.shape)}, window {window}, longest prompt "
            f"{max_tokens}; needs heads a multiple of kv_heads, equal head size and more tokens than the window"
        )
    queries = window if queries is None else queries
    if not 1 <= queries <= window:
        raise ValueError(f"window_mass: queries {queries} must be 1 to {window}, the window")
    count, group = requests.shape[1], heads // kv_heads
    group_rows = queries * group
    if lse is not None:
        _check_lse(lse, (count, kv_heads, group_rows))
    block_d = max(16, triton.next_power_of_2(dim))
    most_rows = _MAX_ROWS_FP32 if q.dtype == torch.float32 else _MAX_ROWS
    block_m = min(most_rows, max(16, triton.next_power_of_2(group_rows)))
    block_n = min(128, max(32, _TILE_BYTES // (block_d * q.element_size())))
    # The kernels work with powers of two.
    scale = scaling * math.log2(math.e)
    # A tile of keys waits for its slots: 5 stages are two tiles of keys in flight, 3 are one.
    stages = 3 if q.dtype == torch.float32 else 5

    tiles = triton.cdiv(group_rows, block_m)
    if lse is None:
        most_splits = _most_splits(group_rows)
        splits = min(most_splits, triton.cdiv(max_tokens, block_n))
        part_max = torch.empty(count * kv_heads * splits * group_rows, dtype=torch.float32, device=q.device)
        part_sum = torch.empty_like(part_max)
        lse = torch.empty(count * kv_heads * group_rows, dtype=torch.float32, device=q.device)
        _partial_lse_kernel[(tiles * splits, kv_heads, count)](
            q, key_buffer, table, requests, part_max, part_sum,
            q.stride(0), q.stride(1), key_buffer.stride(0), key_buffer.stride(1), table.stride(0),
            window, queries, group, splits, scale,
            DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, MOST_SPLITS=most_splits,
            num_warps=4, num_stages=stages,
        )  # fmt: skip
        _merge_lse_kernel[(triton.cdiv(group_rows, _MERGE_ROWS), kv_heads, count)](
            part_max, part_sum, lse, requests, group_rows, splits,
            BLOCK_M=_MERGE_ROWS, BLOCK_N=block_n, MOST_SPLITS=most_splits, num_warps=4,
        )  # fmt: skip
    mass = torch.empty(kv_heads * positions, dtype=torch.float32, device=q.device)
    _mass_kernel[(triton.cdiv(max_tokens - window, block_n), kv_heads, count)](
        q, key_buffer, table, requests, lse, mass,
        q.stride(0), q.stride(1), key_buffer.stride(0), key_buffer.stride(1), table.stride(0),
        window, queries, group, scale,
        DIM=dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, PEAKS=peaks,
        # One tile of rows: nothing to load ahead.
        num_warps=4, num_stages=1 if tiles == 1 else 2,
    )  # fmt: skip
    return mass


def _most_splits(group_rows: int) -> int:
    """Into how many parts a prompt is split at most. Of the rows alone: the order of a request's sums, and so its last
    bits, must not depend on its neighbours. More rows need fewer splits to fill a GPU and cost more per split."""
    return min(128, max(8, 8192 // triton.next_power_of_2(group_rows)))


def _check(q: Tensor, key_buffer: Tensor, table: Tensor, requests: Tensor, window: int) -> None:
    if key_buffer.dtype not in (q.dtype, torch.float8_e4m3fn) or q.dtype not in _QUERY_TYPES:
        raise ValueError(
            f"window_mass: q is {q.dtype}, keys are {key_buffer.dtype}; needs one of bf16, fp16, fp32, or fp8 e4m3 keys"
        )
    if any(t.stride(-1) != 1 for t in (q, key_buffer, table)) or not requests.is_contiguous():
        raise ValueError("window_mass: q, keys and table need a last stride of 1, requests must be contiguous")
    described = requests.dtype == torch.int32 and requests.ndim == 2 and requests.shape[0] == len(Row)
    if table.dtype != torch.int32 or not described:
        raise ValueError(f"window_mass: table is {table.dtype}, requests {requests.dtype} {tuple(requests.shape)}")
    if window < 1 or requests.shape[1] < 1:
        raise ValueError(f"window_mass: window {window}, {requests.shape[1]} requests; needs at least one of each")


def _check_lse(lse: Tensor, shape: tuple[int, int, int]) -> None:
    if lse.dtype != torch.float32 or lse.shape != shape or not lse.is_contiguous():
        raise ValueError(
            f"window_mass: lse is {lse.dtype} {tuple(lse.shape)}; needs contiguous fp32 {shape}: requests, kv_heads, "
            "queries times group"
        )


@triton.jit
def _query_tile(q, first_row, row, kv_head, queries, group, q_row, q_head, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Query rows `row` of a KV head's group, ordered (query, group): [BLOCK_M, BLOCK_D], zeros past either end."""
    dims = tl.arange(0, BLOCK_D)
    rows = q + (first_row + row // group).to(tl.int64) * q_row + (kv_head * group + row % group) * q_head
    inside = (row < queries * group)[:, None] & (dims < DIM)[None, :]
    return tl.load(rows[:, None] + dims[None, :], mask=inside, other=0.0)


@triton.jit
def _key_tile(k, table_row, at, end, kv_head, k_slot, k_head, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys of the tokens `at` that are below `end`, transposed: [BLOCK_D, BLOCK_N], zeros elsewhere."""
    dims = tl.arange(0, BLOCK_D)
    slots = tl.load(table_row + at, mask=at < end, other=0).to(tl.int64)
    keys = k + slots * k_slot + kv_head * k_head
    inside = (dims < DIM)[:, None] & (at < end)[None, :]
    return tl.load(keys[None, :] + dims[:, None], mask=inside, other=0.0)


# Splits grow with the prompt: a kernel for each kind of number would be compiled in the middle of serving.
@triton.jit(do_not_specialize=["splits"])
def _partial_lse_kernel(
    q,
    k,
    table,
    requests,
    part_max,
    part_sum,
    q_row,
    q_head,
    k_slot,
    k_head,
    table_row,
    window,
    queries,
    group,
    splits,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Maximum of the logits and sum of 2^(logit - maximum) over one split of the keys, for one tile of query rows.

    part_max, part_sum: [R, kv_heads, splits, queries * group], logits times log2(e).
    """
    # Tiles of rows are neighbours, so that the keys they share are in L2.
    tiles = tl.cdiv(queries * group, BLOCK_M)
    tile, split = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    kv_head, request = tl.program_id(1), tl.program_id(2)
    count = tl.num_programs(2)
    tokens = tl.load(requests + _TOKENS * count + request)
    share = tl.cdiv(tl.cdiv(tokens, MOST_SPLITS), BLOCK_N) * BLOCK_N
    first = split * share
    if first >= tokens:
        return
    end = tl.minimum(first + share, tokens)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_row = tl.load(requests + _FIRST_ROW * count + request) + window - queries
    tile_q = _query_tile(q, first_row, row, kv_head, queries, group, q_row, q_head, DIM, BLOCK_D)
    slots = table + tl.load(requests + _TABLE_ROW * count + request).to(tl.int64) * table_row
    # Query w is token N - Q + w, and sees itself and what is before it.
    visible = tl.minimum(tokens - queries + row // group + 1, end)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        keys = _key_tile(k, slots, at, end, kv_head, k_slot, k_head, DIM, BLOCK_D).to(tile_q.dtype)
        logits = tl.dot(tile_q, keys, input_precision="ieee") * scale
        logits = tl.where(at[None, :] < visible[:, None], logits, float("-inf"))
        highest = tl.maximum(best, tl.max(logits, axis=1))
        # Nothing visible yet: -inf - -inf would be NaN.
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp2(best - base) + tl.sum(tl.exp2(logits - base[:, None]), axis=1)
        best = highest
    group_rows = queries * group
    place = ((request * tl.num_programs(1) + kv_head) * splits + split).to(tl.int64) * group_rows + row
    tl.store(part_max + place, best, mask=row < group_rows)
    tl.store(part_sum + place, total, mask=row < group_rows)


@triton.jit(do_not_specialize=["splits"])
def _merge_lse_kernel(
    part_max,
    part_sum,
    lse,
    requests,
    group_rows,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MOST_SPLITS: tl.constexpr,
):
    """Log-sum-exp of each query row from its splits: [R, kv_heads, queries * group], to the base 2."""
    kv_head, request = tl.program_id(1), tl.program_id(2)
    tokens = tl.load(requests + _TOKENS * tl.num_programs(2) + request)
    share = tl.cdiv(tl.cdiv(tokens, MOST_SPLITS), BLOCK_N) * BLOCK_N
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.arange(0, MOST_SPLITS)
    first = (request * tl.num_programs(1) + kv_head).to(tl.int64)
    place = (first * splits + split)[:, None] * group_rows + row[None, :]
    inside = (split < tl.cdiv(tokens, share))[:, None] & (row < group_rows)[None, :]
    maxima = tl.load(part_max + place, mask=inside, other=float("-inf"))
    sums = tl.load(part_sum + place, mask=inside, other=0.0)
    highest = tl.max(maxima, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(sums * tl.exp2(maxima - base[None, :]), axis=0)
    tl.store(lse + first * group_rows + row, base + tl.log2(total), mask=row < group_rows)


@triton.jit
def _mass_kernel(
    q,
    k,
    table,
    requests,
    lse,
    mass,
    q_row,
    q_head,
    k_slot,
    k_head,
    table_row,
    window,
    queries,
    group,
    scale,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PEAKS: tl.constexpr,
):
    """Probabilities of one tile of keys before the window: their sum, or maximum, over queries and the GQA group."""
    kv_head, request = tl.program_id(1), tl.program_id(2)
    kv_heads, count = tl.num_programs(1), tl.num_programs(2)
    ranked = tl.load(requests + _TOKENS * count + request) - window
    first = tl.program_id(0) * BLOCK_N
    if first >= ranked:
        return
    at = first + tl.arange(0, BLOCK_N)
    first_row = tl.load(requests + _FIRST_ROW * count + request) + window - queries
    slots = table + tl.load(requests + _TABLE_ROW * count + request).to(tl.int64) * table_row
    keys = _key_tile(k, slots, at, ranked, kv_head, k_slot, k_head, DIM, BLOCK_D).to(q.dtype.element_ty)
    group_rows = queries * group
    row_lse = lse + (request * kv_heads + kv_head).to(tl.int64) * group_rows
    total = tl.zeros([BLOCK_N], tl.float32)
    highest = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, group_rows, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        tile_q = _query_tile(q, first_row, row, kv_head, queries, group, q_row, q_head, DIM, BLOCK_D)
        norm = tl.load(row_lse + row, mask=row < group_rows, other=0.0)
        # Every query sees every key before it: no mask but that of the tile.
        weights = tl.exp2(tl.dot(tile_q, keys, input_precision="ieee") * scale - norm[:, None])
        weights = tl.where((row < group_rows)[:, None], weights, 0.0)
        total += tl.sum(weights, axis=0)
        if PEAKS:
            highest = tl.maximum(highest, tl.max(weights, axis=0))
    if PEAKS:
        # A maximum passes over NaN, a sum does not: one query that failed must not leave the others' values.
        total = highest + 0.0 * total
    before = tl.load(requests + _BEFORE * count + request).to(tl.int64) * kv_heads
    tl.store(mass + before + kv_head.to(tl.int64) * ranked + at, total, mask=at < ranked)
