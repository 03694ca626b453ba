"""Both scorers of the kernels on a real GPU, Triton's and FlashInfer's log-sum-exp, against fp64 torch and each other.

    python3 -m pytest tests/gpu/test_scorers_gpu.py -m gpu

Needs torch, triton and flashinfer, whose kernels are compiled when they are first run (minutes); SGLang need not be
importable.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.forward import scorer_choice
from claa_sglang.forward.scorers import FlashInferScorer, KernelScorer, Scored, in_kernels, make_scorer
from claa_sglang.kernels import paged_lse
from claa_sglang.kernels.layout import Row
from claa_sglang.ranking import rankers, selection
from claa_sglang.ranking.spec import RankerSpec, parse
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests.gpu.test_kernels_gpu import mass_of, reference_mass
from tests.paged import Batch, Shape, make_batch

pytestmark = pytest.mark.gpu
pytest.importorskip("flashinfer")

BF16, FP16 = torch.bfloat16, torch.float16
WINDOW, KEEP_RATE = 32, 0.2
# FlashInfer's log-sum-exp is off by up to 1.1e-3 on an H100: one factor for all weights of a query.
OF_FLASHINFER = 2e-3
STEP = PruneStep(prune_layer=3, keep_rate=KEEP_RATE, score_layers=(1, 2, 3))
CONFIG = ClaaConfig(steps=(STEP,), num_layers=8, window=WINDOW)
# Groups of 1, 4 and 7; prompts of one position before the window, of no whole tile, of several parts; alone and beside
# others. Two pairs of type and head size, as FlashInfer compiles kernels for each.
SHAPES = [
    *(
        Shape((tokens,), WINDOW, kv_heads * group, kv_heads, dim, dtype)
        for tokens in (33, 100, 1025, 8191)
        for group, kv_heads, dim, dtype in ((1, 4, 128, BF16), (4, 8, 128, BF16), (7, 2, 64, FP16))
    ),
    Shape((8191, 33, 1025, 100), WINDOW, 32, 8, 128, BF16),
    Shape((100, 8191, 33), WINDOW, 28, 4, 64, FP16),
    Shape((1025, 33), WINDOW, 8, 8, 128, BF16),
    Shape((131072, 33), WINDOW, 32, 8, 128, BF16),
    Shape((3000,), 1024, 8, 2, 128, BF16),
]
LOOKS = [(WINDOW, True), (WINDOW, False), (8, False), (1, False)]  # queries, peaks


def plan_of(batch: Batch, shape: Shape, queries: int) -> paged_lse.PagedLse:
    first_rows, table_rows, tokens = batch.requests[[Row.FIRST_ROW, Row.TABLE_ROW, Row.TOKENS]].tolist()
    return paged_lse.PagedLse(
        batch.table,
        first_rows,
        table_rows,
        tokens,
        window=shape.window,
        queries=queries,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.dim,
        dtype=shape.dtype,
    )


def mass_with(plan: paged_lse.PagedLse, batch: Batch, shape: Shape, queries: int, peaks: bool) -> Tensor:
    from claa_sglang.kernels.window_attention import window_mass

    scaling = shape.dim**-0.5
    return window_mass(
        *batch[:4],
        window=shape.window,
        scaling=scaling,
        max_tokens=batch.max_tokens,
        positions=batch.positions,
        queries=queries,
        peaks=peaks,
        lse=plan(batch.q, batch.key_buffer, scaling),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("queries", "peaks"), LOOKS, ids=str)
def test_mass_with_flashinfer_s_log_sum_exp_equals_fp64_and_triton_s(shape: Shape, queries: int, peaks: bool) -> None:
    queries = shape.window if queries == WINDOW else queries
    batch = make_batch(shape, device="cuda", spread=1.5)
    got = mass_with(plan_of(batch, shape, queries), batch, shape, queries, peaks)
    torch.testing.assert_close(got, mass_of(batch, shape, queries, peaks), rtol=OF_FLASHINFER, atol=1e-9)
    start = 0
    for want in reference_mass(batch, shape, queries, peaks):
        length = want.shape[1]
        own = got[shape.kv_heads * start : shape.kv_heads * (start + length)].view_as(want)
        torch.testing.assert_close(own.double(), want, rtol=OF_FLASHINFER, atol=1e-9)
        start += length


def test_one_plan_serves_every_layer_and_the_same_bits_come_every_time() -> None:
    shape = Shape((8191, 1025), WINDOW, 32, 8, 128, BF16)
    batch = make_batch(shape, device="cuda", spread=1.5)
    layers = [make_batch(shape, device="cuda", spread=1.5, seed=seed) for seed in range(3)]
    plan = plan_of(batch, shape, WINDOW)
    for layer in [*layers, *layers]:
        same = layer._replace(table=batch.table)  # the same slots, with other numbers in them
        alone = mass_with(plan_of(same, shape, WINDOW), same, shape, WINDOW, True)
        assert torch.equal(mass_with(plan, same, shape, WINDOW, True), alone)


def test_many_plans_before_the_gpu_has_seen_the_first() -> None:
    """What a plan copies from pinned memory must still be there when the GPU comes to it."""
    shapes = [Shape((tokens,), WINDOW, 32, 8, 128, BF16) for tokens in (8191, 100, 4097, 1025)]
    batches = [make_batch(shape, device="cuda", spread=1.5) for shape in shapes]
    expected = [mass_of(batch, shape, WINDOW, True) for batch, shape in zip(batches, shapes, strict=True)]
    for batch, shape in zip(batches, shapes, strict=True):  # compiled, and wrappers are there to be used again
        mass_with(plan_of(batch, shape, WINDOW), batch, shape, WINDOW, True)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    found = [
        mass_with(plan_of(batch, shape, WINDOW), batch, shape, WINDOW, True)
        for batch, shape in zip(batches, shapes, strict=True)
    ]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=OF_FLASHINFER, atol=1e-9)


def test_neither_planning_nor_running_waits_for_the_gpu() -> None:
    shape = Shape((8191, 1025), WINDOW, 32, 8, 128, BF16)
    batch = make_batch(shape, device="cuda", spread=1.5)
    lists = batch.requests[[Row.FIRST_ROW, Row.TABLE_ROW, Row.TOKENS]].tolist()
    of: dict[str, Any] = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": BF16}
    for _ in range(2):  # what is compiled and allocated the first time may wait
        plan = paged_lse.PagedLse(batch.table, *lists, window=WINDOW, queries=WINDOW, **of)
        plan(batch.q, batch.key_buffer, 0.1)
        torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = torch.cuda.Event()
        torch.cuda._sleep(500_000_000)
        plan = paged_lse.PagedLse(batch.table, *lists, window=WINDOW, queries=WINDOW, **of)
        plan(batch.q, batch.key_buffer, 0.1)
        done.record()
        assert not done.query()  # the GPU is still asleep
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_broken_key_or_query_spoils_its_own_head_alone() -> None:
    """FlashInfer leaves a broken key out of its sum, so the head's other weights may stay finite. The broken one does
    not, and makes the head's fold NaN."""
    shape = Shape((4000, 900), WINDOW, 8, 2, 64, BF16)
    ranked = 4000 - WINDOW
    for peaks in (False, True):
        batch = make_batch(shape, device="cuda")
        sound = mass_with(plan_of(batch, shape, WINDOW), batch, shape, WINDOW, peaks)
        for what in ("key", "query"):
            broken = make_batch(shape, device="cuda")
            if what == "key":
                broken.key_buffer[broken.table[2, 2000].long(), 1, 5] = torch.nan
            else:
                broken.q[broken.requests[Row.FIRST_ROW, 0] + 3, 6, 5] = torch.nan
            got = mass_with(plan_of(broken, shape, WINDOW), broken, shape, WINDOW, peaks)
            head = got[ranked : 2 * ranked]
            assert bool((head[2000] if what == "key" else head).isnan().all()), (what, peaks)
            torch.testing.assert_close(got[:ranked], sound[:ranked])
            torch.testing.assert_close(got[2 * ranked :], sound[2 * ranked :])


@pytest.mark.parametrize("ranker", ["claa:last=off,carry=0", "claa:paper", "last-query:carry=0"])
def test_the_scorers_keep_the_same_tokens_within_rounding(ranker: str) -> None:
    """A token that one of them keeps and the other drops ranks within rounding of the edge. Explained, each layer
    alone ranks as in torch."""
    shape = Shape((8191, 1025, 3000), WINDOW, 32, 8, 128, BF16)
    layers = [make_batch(shape, device="cuda", spread=1.5, seed=seed) for seed in range(3)]
    table = layers[0].table
    first_rows, table_rows, tokens = layers[0].requests[[Row.FIRST_ROW, Row.TABLE_ROW, Row.TOKENS]].tolist()
    made = rankers.make(parse(ranker), pool_kernel=CONFIG.pool_kernel)
    kinds = {"triton": KernelScorer, "flashinfer": FlashInferScorer}
    found: dict[str, list[Tensor]] = {}
    alone: dict[str, list[list[Tensor]]] = {}
    asked = RequestOptions(ranker=ranker, explain=True)
    for name, kind in kinds.items():
        requests = [
            Scored(i, RequestState.pruned_request(asked, CONFIG, n), first, row, n)
            for i, (n, first, row) in enumerate(zip(tokens, first_rows, table_rows, strict=True))
        ]
        scorer = make_scorer(requests, table, msgspec.structs.replace(CONFIG, scorer=name))
        assert type(scorer) is kind
        for layer in layers:
            scorer.score(layer.q, layer.key_buffer, 128**-0.5)
        alone[name] = [scorer.layers(request.request) for request in requests]
        found[name] = [scorer.ranking(request.request) for request in requests]
        assert all(request.state.progress.error is None for request in requests)
    for i, n in enumerate(tokens):
        rows, own = slice(first_rows[i], first_rows[i] + WINDOW), table[table_rows[i], :n].long()
        scores = [made.score_layer(one.q[rows], one.key_buffer[own], scaling=128**-0.5) for one in layers]
        want, kept = made.rank(scores), WINDOW + n // 5
        by_torch = set(selection.select(want, n, kept, WINDOW).tolist())
        edge = want[sorted(by_torch - {0, *range(n - WINDOW, n)})].min()
        for name, rankings in found.items():
            torch.testing.assert_close(rankings[i], want, rtol=1e-3, atol=1e-3, msg=f"{name}, request {i}")
            by_layer = [made.rank([layer]) for layer in scores]
            torch.testing.assert_close(alone[name][i], by_layer, rtol=1e-3, atol=1e-3, msg=f"{name}, request {i}")
            differing = by_torch ^ set(selection.select(rankings[i], n, kept, WINDOW).tolist())
            for position in differing:
                assert abs(want[position] - edge) <= 2e-3 * (1 + abs(edge)), (name, i, position)


def test_auto_chooses_and_says_why(capsys: pytest.CaptureFixture) -> None:
    keys = torch.randn(20000, 8, 128, device="cuda").to(BF16)
    table = torch.zeros(4, 20000, dtype=torch.int32, device="cuda")
    ranker = in_kernels(RankerSpec(), CONFIG)
    assert ranker is not None
    asked = scorer_choice.choose(msgspec.structs.replace(CONFIG, scorer="flashinfer"), keys, 32, table, ranker)
    assert asked.scorer == "flashinfer" and paged_lse.is_ready(BF16, 128)
    scorer_choice.choose(CONFIG, keys, 32, table, ranker)  # compiles what Triton has not
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    choice = scorer_choice.choose(CONFIG, keys, 32, table, ranker)
    end.record()
    end.synchronize()
    assert choice.scorer in ("triton", "flashinfer") and set(choice.microseconds) == {"triton", "flashinfer"}
    assert scorer_choice.faster(choice.microseconds).scorer == choice.scorer
    with capsys.disabled():
        print(f"\nauto: {choice}, {begin.elapsed_time(end):.0f} ms")
    assert begin.elapsed_time(end) < 300
