"""The Triton kernels on a real GPU against fp64 torch on the same GPU, and their times beside the bytes they must move.

    python3 -m pytest tests/gpu -m gpu -s

Needs torch and triton; SGLang need not be importable. The peak that the printed shares refer to is measured: a device
copy of 1 GiB.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.forward.scorers import Scored, SeveralScorers, make_scorer
from claa_sglang.kernels import fold, rows, scoring, window_attention
from claa_sglang.kernels.layout import Row
from claa_sglang.memory.boundary import BoundaryStore
from claa_sglang.ranking import rankers, selection
from claa_sglang.ranking.carry import carry
from claa_sglang.ranking.spec import parse
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState
from tests.paged import Batch, Shape, dequantised, make_batch

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
STEP = PruneStep(prune_layer=3, keep_rate=0.25, score_layers=(1, 2, 3))
CONFIG = ClaaConfig(steps=(STEP,), num_layers=8, window=32)
OF_QUERIES = [Row.FIRST_ROW, Row.TABLE_ROW, Row.TOKENS]
SHAPES = [
    Shape((9, 40, 1500), 8, 4, 2, 16, FP32),
    Shape((4097, 9, 700), 8, 9, 3, 64, BF16),
    Shape((3000, 2999), 5, 7, 1, 96, FP16),
    Shape((8192, 1000), 8, 32, 8, 128, BF16),
    Shape((2500,), 8, 16, 1, 128, FP16),
    Shape((2000,), 64, 6, 2, 192, BF16),
    Shape((3000,), 1024, 4, 2, 64, BF16),
    Shape((2000,), 100, 10, 2, 256, FP16),
    Shape((2000,), 8, 8, 1, 128, FP32),
    Shape((3000,), 1, 1, 1, 64, FP32),
    Shape((131072,), 8, 32, 8, 128, BF16),
    Shape((131072, 50000), 8, 9, 3, 64, FP16),
    Shape((131072,), 8, 8, 2, 256, BF16),
    Shape((8192, 1000), 32, 32, 8, 128, BF16, fp8_keys=True),
    Shape((2000, 40), 32, 8, 1, 128, FP32, fp8_keys=True),
]


# The window that the server has unless told otherwise; of the third, most of the prompt is window.
SERVED = [
    Shape((9000, 33, 700), 32, 32, 8, 128, BF16),
    Shape((4097, 1000), 32, 9, 3, 64, FP16),
    Shape((1500,), 1024, 4, 2, 64, BF16),
    Shape((2000, 40), 32, 8, 1, 128, FP32),
    Shape((131072,), 32, 32, 8, 128, BF16),
]
OF_RANKER = {"claa": (None, True), "paper": (8, False), "last": (1, False)}  # queries, peaks


def mass_of(batch: Batch, shape: Shape, queries: int | None = None, peaks: bool = False) -> Tensor:
    return window_attention.window_mass(
        *batch[:4],
        window=shape.window,
        scaling=shape.dim**-0.5,
        max_tokens=batch.max_tokens,
        positions=batch.positions,
        queries=queries,
        peaks=peaks,
    )


def reference_mass(batch: Batch, shape: Shape, queries: int | None = None, peaks: bool = False) -> list[Tensor]:
    """fp64 `[kv_heads, N-W]` per request, a KV head at a time."""
    window, group, out = shape.window, shape.heads // shape.kv_heads, []
    batch = dequantised(batch)
    queries = queries or window
    future = torch.ones(queries, queries, dtype=torch.bool, device=batch.q.device).triu(1)
    for first_row, table_row, tokens in batch.requests[OF_QUERIES].T.tolist():
        slots = batch.table[table_row, :tokens].long()
        heads = []
        for kv_head in range(shape.kv_heads):
            of_head = slice(kv_head * group, (kv_head + 1) * group)
            q = batch.q[first_row + window - queries : first_row + window, of_head].double()
            logits = q.transpose(0, 1) @ batch.key_buffer[slots, kv_head].double().T * shape.dim**-0.5
            logits[..., tokens - queries :].masked_fill_(future, -torch.inf)
            weights = logits.softmax(-1)[..., : tokens - window]
            heads.append(weights.amax((0, 1)) if peaks else weights.sum((0, 1)))
        out.append(torch.stack(heads))
    return out


def reference_ranking(mass: Tensor, pool: int) -> Tensor:
    """fp64 `[N-W]` of an fp64 mass `[kv_heads, N-W]`."""
    pooled = torch.nn.functional.avg_pool1d(mass, pool, stride=1, padding=pool // 2, count_include_pad=True)
    if pooled.shape[1] == 1:
        return torch.zeros_like(pooled[0])
    std, mean = torch.std_mean(pooled, dim=-1, keepdim=True)
    return ((pooled - mean) / (std + 1e-8)).amax(0)


def fold_of(mass: Tensor, batch: Batch, shape: Shape, ranking: Tensor, pool: int = 7, first: bool = True) -> None:
    fold.fold(
        mass,
        batch.requests,
        ranking,
        window=shape.window,
        pool_kernel=pool,
        max_tokens=batch.max_tokens,
        first_layer=first,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mass_and_ranking_equal_fp64(shape: Shape) -> None:
    check(shape)


@pytest.mark.parametrize("shape", SERVED, ids=str)
@pytest.mark.parametrize("ranker", OF_RANKER)
def test_what_a_ranker_reads_equals_fp64(ranker: str, shape: Shape) -> None:
    check(shape, *OF_RANKER[ranker])


def check(shape: Shape, queries: int | None = None, peaks: bool = False) -> None:
    batch = make_batch(shape, device="cuda", spread=1.5)
    if queries:  # those before them may be anything
        for first_row in batch.requests[Row.FIRST_ROW].tolist():
            batch.q[first_row : first_row + shape.window - queries] = torch.nan
    mass = mass_of(batch, shape, queries, peaks)
    ranks = torch.full((batch.positions,), torch.inf, device="cuda")
    fold_of(mass, batch, shape, ranks)
    assert torch.equal(mass, mass_of(batch, shape, queries, peaks))  # the same bits every time
    start = 0
    for want in reference_mass(batch, shape, queries, peaks):
        length = want.shape[1]
        got = mass[shape.kv_heads * start : shape.kv_heads * (start + length)].view_as(want)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-9)
        own = ranks[start : start + length].double()
        torch.testing.assert_close(own, reference_ranking(want, 7), rtol=1e-3, atol=1e-3)
        start += length


@pytest.mark.parametrize("window", [8, 32])
@pytest.mark.parametrize("ranker", OF_RANKER)
def test_a_batch_gives_each_request_the_bits_it_gets_alone(ranker: str, window: int) -> None:
    shape, how = Shape((20000, 300, 5000), window, 32, 8, 128, BF16), OF_RANKER[ranker]
    batch = make_batch(shape, device="cuda")
    mass, ranks = mass_of(batch, shape, *how), torch.empty(batch.positions, device="cuda")
    fold_of(mass, batch, shape, ranks)
    start = 0
    for i, tokens in enumerate(shape.tokens):
        ranked = tokens - window
        requests = batch.requests[:, i : i + 1].clone()
        requests[Row.BEFORE] = 0
        alone = batch._replace(requests=requests, max_tokens=tokens, positions=ranked)
        own_mass, own = mass_of(alone, shape, *how), torch.empty(ranked, device="cuda")
        fold_of(own_mass, alone, shape, own)
        assert torch.equal(own_mass, mass[8 * start : 8 * (start + ranked)])
        assert torch.equal(own, ranks[start : start + ranked])
        start += ranked


def test_a_broken_key_spoils_its_own_head_and_the_rest_decides() -> None:
    shape = Shape((4000, 900), 8, 8, 2, 64, BF16)
    batch = make_batch(shape, device="cuda")
    sound = mass_of(batch, shape)
    batch.key_buffer[batch.table[2, 2000].long(), 1, 5] = torch.nan
    got = mass_of(batch, shape)
    assert bool(got[3992 : 2 * 3992].isnan().all())
    assert torch.equal(got[:3992], sound[:3992]) and torch.equal(got[2 * 3992 :], sound[2 * 3992 :])
    ranks = torch.empty(batch.positions, device="cuda")
    fold_of(got, batch, shape, ranks)
    want = reference_ranking(sound[:3992].view(1, -1).double(), 7)
    torch.testing.assert_close(ranks[:3992].double(), want, rtol=1e-3, atol=1e-3)
    assert ranks.isfinite().all()


@pytest.mark.parametrize("peaks", [False, True], ids=["sum", "max"])
def test_a_broken_query_spoils_its_own_head(peaks: bool) -> None:
    shape = Shape((4000, 900), 32, 8, 2, 64, BF16)
    ranked = 4000 - 32
    batch = make_batch(shape, device="cuda")
    sound = mass_of(batch, shape, peaks=peaks)
    batch.q[batch.requests[Row.FIRST_ROW, 0] + 3, 6, 5] = torch.nan  # first request, KV head 1
    got = mass_of(batch, shape, peaks=peaks)
    assert bool(got[ranked : 2 * ranked].isnan().all())
    assert torch.equal(got[:ranked], sound[:ranked]) and torch.equal(got[2 * ranked :], sound[2 * ranked :])


@pytest.mark.parametrize("positions", [1, 2, 1000, 131072])
@pytest.mark.parametrize("loss", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("kind", ["distinct", "ties", "broken"])
def test_what_is_carried_and_kept_is_what_the_cpu_says(positions: int, loss: float, kind: str) -> None:
    ranking = torch.rand(positions, generator=torch.Generator().manual_seed(positions))
    if kind == "ties":
        ranking = (4 * ranking).floor()
    if kind == "broken":
        ranking[::3], ranking[1::5] = torch.nan, -torch.inf
    ours, cpu = carry(ranking.cuda(), loss), carry(ranking, loss)
    assert torch.equal(ours.cpu(), cpu)
    for kept in (32, 33, 32 + positions // 5):
        assert torch.equal(
            selection.select(ours, positions + 32, kept, 32).cpu(), selection.select(cpu, positions + 32, kept, 32)
        )


def test_the_scorer_of_a_batch_with_several_rankers_is_torch() -> None:
    """Requests next to each other have the same prompt and ranker, but that the second carries.

    The last two join the rankings of the first and the fifth, and have the same prompt as these.
    """
    names = ["claa:last=off,carry=0", "claa:last=off", "claa:paper", "claa:queries=sum,carry=0.05"]
    names += ["last-query:carry=0", "last-query", "claa:last=off,carry=0,kernel=13", "claa:last=off,kernel=13"]
    names += ["fastkv", "uniform", "claa:heads=sum", "claa", "claa:carry=0"]
    shape = Shape((3000,) * 8 + (900, 500, 2000, 3000, 3000), 32, 8, 2, 64, BF16)
    batch = make_batch(shape, device="cuda", spread=1.5)
    first_rows, table_rows, _ = batch.requests[OF_QUERIES].tolist()
    for rows_of in (first_rows, table_rows):
        rows_of[4] = rows_of[11] = rows_of[12] = rows_of[0]
        rows_of[1:8:2] = rows_of[:8:2]
    requests = [
        Scored(i, RequestState.pruned_request(RequestOptions(ranker=name), CONFIG, n), first, row, n)
        for i, (name, n, first, row) in enumerate(zip(names, shape.tokens, first_rows, table_rows, strict=True))
    ]
    scorer = make_scorer(requests, batch.table, CONFIG)
    assert isinstance(scorer, SeveralScorers)
    # The same slots and query rows, with other numbers in them.
    layers = [make_batch(shape, device="cuda", spread=1.5, seed=seed) for seed in range(3)]
    own: list[list[Tensor]] = [[] for _ in names]
    made = [rankers.make(parse(name), pool_kernel=CONFIG.pool_kernel) for name in names]
    for layer in layers:
        scorer.score(layer.q, layer.key_buffer, 0.125)
        for ranker, request, scores in zip(made, requests, own, strict=True):
            q = layer.q[request.first_row : request.first_row + 32]
            k = layer.key_buffer[batch.table[request.table_row, : request.tokens].long()]
            scores.append(ranker.score_layer(q, k, scaling=0.125))
    for i, (name, ranker, scores) in enumerate(zip(names, made, own, strict=True)):
        assert requests[i].state.progress.error is None
        got = scorer.ranking(i)
        if i < 8 and i % 2:  # in the kernels, and carries
            assert torch.equal(got, carry(scorer.ranking(i - 1), ranker.carry)), name
        elif i < 8:
            torch.testing.assert_close(got, ranker.rank(scores), rtol=1e-3, atol=1e-3, msg=name)
        elif i > 10:  # in the kernels, and joined
            assert torch.equal(got, rankers.join(scorer.ranking(0), scorer.ranking(4), ranker.carry)), name
        else:
            assert torch.equal(got, ranker.rank(scores)), name


@pytest.mark.parametrize("positions", [1, 1023, 1025, 131072, 1 << 20])
@pytest.mark.parametrize("pool", [1, 7, 63])
def test_fold_of_long_rows_of_tiny_scores(positions: int, pool: int) -> None:
    shape = Shape((positions + 8,), 8, 2, 2, 64, BF16)
    requests = torch.tensor([[0], [0], [positions + 8], [0]], dtype=torch.int32, device="cuda")
    batch = Batch(*(torch.empty(0),) * 3, requests, positions + 8, positions)
    generator = torch.Generator("cuda").manual_seed(0)
    layers = [8 / positions * torch.rand(3, positions, device="cuda", generator=generator) ** 8 for _ in range(2)]
    ranks = torch.full((positions,), torch.inf, device="cuda")
    for i, mass in enumerate(layers):
        fold_of(mass.flatten(), batch, shape, ranks, pool, first=i == 0)
    want = torch.maximum(*(reference_ranking(mass.double(), pool) for mass in layers))
    torch.testing.assert_close(ranks.double(), want, rtol=1e-3, atol=2e-3)
    again = torch.empty_like(ranks)
    for i, mass in enumerate(layers):
        fold_of(mass.flatten(), batch, shape, again, pool, first=i == 0)
    assert torch.equal(again, ranks)


def torch_store(buffers: list[Tensor], hidden: int, dtype: torch.dtype) -> BoundaryStore:
    """A boundary store that moves states with torch, as it does where there is no GPU."""
    store = BoundaryStore(buffers, hidden, dtype)
    store._launch = None
    return store


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("width", [1024, 96, 100], ids="row{}".format)
@pytest.mark.parametrize("hidden", [2048, 1500], ids="H{}".format)
def test_rows_equal_the_boundary_store(dtype: torch.dtype, width: int, hidden: int) -> None:
    # In 16 bits there must be room for the pair; in float32 the narrow rows hold the sum alone.
    count = 24 if dtype is FP32 else 1 + -(-2 * hidden // width)
    ours = [torch.full((500, 2, width // 2), -7.0, dtype=dtype, device="cuda") for _ in range(count)]
    theirs = [buffer.clone() for buffer in ours]
    store = torch_store(theirs, hidden, dtype)
    counts = [count for _, _, count in store._parts]
    parts, vector = rows.make_parts(ours[: len(counts)], counts)
    slots = torch.randperm(500, device="cuda")[:333]
    hiddens, residuals = (torch.randn(333, hidden, dtype=dtype, device="cuda") for _ in range(2))
    store.store(slots, hiddens, residuals)
    rows.store(parts, slots, hiddens, residuals, is_pair=store.is_pair, vector=vector)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    got = [torch.empty(333, hidden, dtype=dtype, device="cuda") for _ in range(2)]
    rows.load(parts, slots, *got, is_pair=store.is_pair, vector=vector)
    for a, b in zip(got, store.load(slots), strict=True):
        assert torch.equal(a, b)


# --- times ---------------------------------------------------------------------------------------------------------


def microseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Median time of one call on the GPU; before each, a fill that empties L2 and lets the CPU get ahead."""
    flush = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return sorted(times)[repeats // 2]


@pytest.fixture(scope="module")
def peak() -> float:
    """Bytes per microsecond of a device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    value = 2 * source.numel() / microseconds(lambda: target.copy_(source))
    print(f"\n{torch.cuda.get_device_name()}, device copy {value / 1e6:.2f} TB/s, torch {torch.__version__}")
    return value


TIMED = [
    Shape((n,) * count, 8, heads, kv_heads, dim, BF16)
    for n, count in ((2048, 1), (8192, 1), (32768, 1), (131072, 1), (8192, 8))
    for heads, kv_heads, dim in ((32, 8, 128), (9, 3, 64))
]


@pytest.mark.parametrize("shape", TIMED, ids=str)
def test_time_of_a_scored_layer(shape: Shape, peak: float) -> None:
    """Beside it: reading K twice at the speed of a copy, and the torch path, a request at a time."""
    batch = make_batch(shape, device="cuda")
    ranks = torch.empty(batch.positions, device="cuda")
    mass = mass_of(batch, shape)
    requests = batch.requests[OF_QUERIES].T.tolist()

    def torch_path() -> None:
        for first_row, table_row, tokens in requests:
            keys = batch.key_buffer[batch.table[table_row, :tokens]]
            q = batch.q[first_row : first_row + shape.window]
            selection.rank([scoring.window_scores(q, keys, scaling=shape.dim**-0.5, pool_kernel=7)])

    attention = microseconds(lambda: mass_of(batch, shape))
    folding = microseconds(lambda: fold_of(mass, batch, shape, ranks))
    before = microseconds(torch_path)
    bound = 2 * 2 * sum(shape.tokens) * shape.kv_heads * shape.dim / peak
    print(
        f"\n{shape}: mass {attention:.0f} us (K twice at copy speed: {bound:.0f}), fold {folding:.0f} us; "
        f"torch {before:.0f} us"
    )


@pytest.mark.parametrize("count", [1, 64, 8192])
def test_time_of_boundary_rows(count: int, peak: float) -> None:
    """Llama-3-8B: H 4096, rows of 1024, 8 parts."""
    buffers = [torch.empty(40000, 8, 128, dtype=BF16, device="cuda") for _ in range(8)]
    store = torch_store(buffers, 4096, BF16)
    parts, vector = rows.make_parts(buffers, [1024] * 8)
    slots = torch.randperm(40000, device="cuda")[:count]
    h, r = torch.randn(2, count, 4096, device="cuda").to(BF16)
    bound = 2 * 2 * 2 * count * 4096 / peak
    ours = microseconds(lambda: rows.store(parts, slots, h, r, is_pair=True, vector=vector))
    theirs = microseconds(lambda: store.store(slots, h, r))
    back = microseconds(lambda: rows.load(parts, slots, h, r, is_pair=True, vector=vector))
    torch_back = microseconds(lambda: store.load(slots))
    print(
        f"\n{count} rows: store {ours:.0f} us (torch {theirs:.0f}), load {back:.0f} us (torch {torch_back:.0f}), "
        f"at copy speed {bound:.0f}"
    )
