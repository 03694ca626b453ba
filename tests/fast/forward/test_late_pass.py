"""One forward of a mixed batch, one and two prune steps, against plain loops (late_world)."""

from __future__ import annotations

import pytest
import torch

from claa_sglang.config.config import PruneStep
from claa_sglang.forward.batch_plan import plan_decode
from claa_sglang.forward.kept_rows import list_kept
from claa_sglang.memory.admission import chunk_len
from tests.fast.late_answers import check, kept_positions
from tests.fast.late_world import LAYERS, ONE_STEP, STRIDE, TWO_STEPS, WIDTH, WINDOW, Request, World

STEPS = pytest.mark.parametrize("steps", [ONE_STEP, TWO_STEPS], ids=["one-step", "two-steps"])
RESTRICTED = pytest.mark.parametrize("dense_layers", [None, 1], ids=["", "over kept"])
TWO_ONLY = pytest.mark.parametrize("steps", [TWO_STEPS], ids=["two-steps"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors are tiny: on a busy machine threads waiting for each other would take nearly all of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kept(request: Request) -> list[list[int]]:
    assert request.state is not None
    return [k.tolist() for k in request.state.progress.kept if k is not None]


def rows(text: int, positions: list[int] | range) -> list[list[float]]:
    """Rows that ran through every layer."""
    return [[text, p, LAYERS] for p in positions]


def prefill(world: World, request: Request, *chunks: int) -> torch.Tensor:
    out = torch.empty(0)
    for chunk in [*chunks, request.total - request.length - sum(chunks)]:
        out = world.extend([(request, chunk)])[request]
        check(world, [request])
    return out


# --- what survives a prune ---


@STEPS
@pytest.mark.parametrize("prompt", [1, 3, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 17, 40])
def test_a_cold_prompt(steps: tuple[PruneStep, ...], prompt: int) -> None:
    world = World(steps)
    request = world.add(text=1, prompt=prompt)
    out = prefill(world, request)
    # Only the row the next token comes from.
    assert out[-1:].tolist() == rows(1, [prompt - 1]) and not out[:-1].any()
    assert [len(k) for k in kept(request)] == list(request.state.plan.kept_counts)
    visible = (prompt, *request.state.plan.kept_counts)
    assert len(world.rankings) == sum(visible[i + 1] < visible[i] for i in range(len(steps)))


@STEPS
@pytest.mark.parametrize("hit", [1, 13, 20 - WINDOW])
def test_a_prefix_hit_gives_the_rows_of_a_cold_prompt(steps: tuple[PruneStep, ...], hit: int) -> None:
    world = World(steps)
    cold = world.add(text=2, prompt=20)
    out = prefill(world, cold)
    crossed = world.read
    warm = world.add(text=2, prompt=20)
    world.hit(warm, cold, hit)
    assert torch.equal(prefill(world, warm)[-1], out[-1])
    assert kept(warm) == kept(cold)
    for layer in range(LAYERS):
        assert world.read[layer][warm.row] == crossed[layer][cold.row]


@STEPS
@pytest.mark.parametrize("chunks", [(16,), (1, 15), (5, 5, 6)], ids=str)
def test_chunks_give_the_rows_of_one(steps: tuple[PruneStep, ...], chunks: tuple[int, ...]) -> None:
    world = World(steps)
    whole, cut = world.add(text=3, prompt=20), world.add(text=3, prompt=20)
    assert torch.equal(prefill(world, whole)[-1], prefill(world, cut, *chunks)[-1])
    assert kept(whole) == kept(cut)


@STEPS
def test_a_prefix_shared_by_two_questions_shows_neither_the_others_late_state(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    donor = world.add(text=4, prompt=30)
    prefill(world, donor)
    short, long = world.add(text=4, prompt=22), world.add(text=4, prompt=28, keep_rate=0.9)
    for request in (short, long):
        world.hit(request, donor, 15)
    world.extend([(short, 7), (long, 13)])
    check(world, [short, long])
    for _ in range(3):
        world.decode([donor, long, short])
        check(world, [donor, short, long])


@STEPS
def test_keeping_everything_needs_no_ranking(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    request = world.add(text=1, prompt=20, keep_rate=1.0)
    prefill(world, request, 10)
    assert kept(request) == [list(range(20))] * len(steps)
    assert world.rankings == []
    world.decode([request])
    check(world, [request])


# --- batches ---


@STEPS
def test_a_mixed_batch(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    donor, dense_donor = world.add(text=1, prompt=24), world.add(text=5, prompt=9, pruned=False)
    world.extend([(donor, 24), (dense_donor, 9)])
    check(world, [donor, dense_donor])
    resumed = world.retract(generate(world, donor, 3))

    warm, middle, cold = world.add(text=1, prompt=20), world.add(text=2, prompt=30), world.add(text=3, prompt=11)
    dense, dense_warm = world.add(text=4, prompt=7, pruned=False), world.add(text=5, prompt=12, pruned=False)
    world.hit(warm, donor=_still(world, warm), length=16)
    world.hit(dense_warm, dense_donor, 9)
    out = world.extend([(dense, 7), (middle, 12), (warm, 4), (dense_warm, 2), (cold, 11), (resumed, 27)])
    check(world, [dense, middle, warm, dense_warm, cold, resumed])
    assert out[dense].tolist() == rows(4, range(7))
    assert out[dense_warm].tolist() == rows(5, [9, 10])  # a dense request in the middle of its prompt has all its rows
    assert not out[middle].any()
    for request, last in ((warm, 19), (cold, 10), (resumed, 26)):
        assert out[request][-1:].tolist() == rows(request.text, [last]) and not out[request][:-1].any()

    world.extend([(middle, 18), (dense_warm, 1)])
    check(world, [middle, dense_warm])
    out_decode = world.decode([dense_warm, middle, resumed, dense, cold])
    check(world, [dense_warm, middle, resumed, dense, cold])
    assert out_decode.tolist() == [[5, 12, LAYERS], [2, 30, LAYERS], [1, 27, LAYERS], [4, 7, LAYERS], [3, 11, LAYERS]]


def generate(world: World, request: Request, count: int) -> Request:
    for _ in range(count):
        world.decode([request])
        check(world, [request])
    return request


def _still(world: World, like: Request) -> Request:
    """A finished request of the same text, as the tree remembers it."""
    donor = world.add(text=like.text, prompt=like.prompt)
    prefill(world, donor)
    return donor


@STEPS
def test_chunks_in_the_middle_alone_reach_no_late_layer(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    first, second = world.add(text=1, prompt=20), world.add(text=2, prompt=20)
    world.extend([(first, 5), (second, 9)])
    check(world, [first, second])
    assert world.last is not None and not world.last.has_late_rows and world.prepared == [] and world.rankings == []
    assert kept(first) == kept(second) == []


# --- retraction ---


@STEPS
@pytest.mark.parametrize("chunks", [(), (7,), (22,)], ids=str)
def test_a_resumed_request_keeps_what_it_kept_and_all_it_generated(
    steps: tuple[PruneStep, ...], chunks: tuple[int, ...]
) -> None:
    world = World(steps)
    request = world.add(text=2, prompt=20)
    prefill(world, request)
    before = kept(request)
    resumed = world.retract(generate(world, request, 5))
    out = prefill(world, resumed, *chunks)
    assert kept(resumed) == before and world.rankings == []
    assert out[-1].tolist() == [2, 24, LAYERS]
    generate(world, resumed, 2)


@STEPS
def test_a_resumed_request_with_its_own_prefix_cached(steps: tuple[PruneStep, ...]) -> None:
    # The whole prompt and some of the answer are in the tree: fewer rows than the prompt had are computed.
    world = World(steps)
    request, donor = world.add(text=2, prompt=20), world.add(text=2, prompt=26)
    prefill(world, donor)
    prefill(world, request)
    resumed = world.retract(generate(world, request, 5))
    world.hit(resumed, donor, 22)
    assert prefill(world, resumed).tolist()[-1] == [2, 24, LAYERS]
    generate(world, resumed, 2)


# --- decoding over kept tokens ---


@STEPS
@pytest.mark.parametrize("dense_layers", [0, 1, 2])
def test_generated_tokens_read_kept_ones_from_a_layer_on(steps: tuple[PruneStep, ...], dense_layers: int) -> None:
    world = World(steps, dense_layers=dense_layers)
    pruned, everything = world.add(text=1, prompt=30), world.add(text=2, prompt=20, keep_rate=1.0)
    dense = world.add(text=4, prompt=9, pruned=False)
    world.extend([(pruned, 30), (everything, 20), (dense, 9)])
    check(world, [pruned, everything, dense])
    for _ in range(3):
        world.decode([everything, pruned, dense])
        check(world, [everything, pruned, dense])
    (kept, *_), layer = kept_positions(world, pruned), world.config.kept_layers.start
    assert world.read[layer][pruned.row] == [(1, p) for p in [*kept, 30, 31, 32]]
    if layer:
        assert len(world.read[layer - 1][pruned.row]) == 33
    world.decode([everything, dense])  # nobody whose row differs from stock's
    assert world.last is not None and world.last.kept is None


@STEPS
def test_slots_of_the_prefix_cache_take_the_place_of_its_own(steps: tuple[PruneStep, ...]) -> None:
    """With overlap, stock caches a prompt after the first token's step was made."""
    world = World(steps, dense_layers=1)
    request = world.add(text=1, prompt=30)
    prefill(world, request)
    generate(world, request, 1)
    world.cached(request)
    generate(world, request, 2)
    world.cached(request)
    assert request.state is not None
    request.state.progress.listed = (request.row, 0)  # had nobody noticed
    with pytest.raises(AssertionError, match="lists other slots than its request has"):
        world.decode([request])


def test_a_request_that_failed_before_it_was_ranked_is_left_alone() -> None:
    world = World(ONE_STEP, dense_layers=1)
    failed, beside = world.add(text=1, prompt=30), world.add(text=2, prompt=20)
    world.extend([(failed, 30), (beside, 20)])
    assert failed.state is not None
    failed.state.progress.kept[0] = None
    failed.state.progress.fail("ranking its prompt", RuntimeError("planted"))
    plan = plan_decode([failed.state], rows=[failed.row], seq_lens=[31], table_stride=STRIDE, num_steps=1, stale=[True])
    assert plan is not None
    before = world.table.clone()
    list_kept(plan, world.table, torch.tensor([7]), checked=True)
    assert torch.equal(world.table, before)


# --- ranking ---


@STEPS
def test_scores_are_asked_for_where_somebody_is_ranked(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    request, dense = world.add(text=1, prompt=20), world.add(text=2, prompt=20, pruned=False)

    def asked() -> list[tuple[int, int]]:
        assert world.last is not None
        return [(v, n) for v in range(len(steps) + 1) for n in range(LAYERS) if world.last.needs_scores(v, n)]

    world.extend([(request, 8), (dense, 20)])
    assert asked() == []
    seen: list[tuple[int, int]] = []
    world.ranked = lambda ranking: seen.extend(asked()) or ranking
    world.extend([(request, 12)])
    # When the first ranking is agreed on, everything still is to be ranked.
    assert set(seen) >= {(level, layer) for level, step in enumerate(steps) for layer in step.score_layers}
    assert asked() == []  # all is known
    world.decode([request, dense])
    assert asked() == []


@STEPS
def test_the_ranking_the_ranks_agree_on_decides(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    world.ranked = lambda ranking: torch.arange(len(ranking)).float()
    request = world.add(text=1, prompt=20)
    world.extend([(request, 20)])
    # And the first token, which is kept whatever the ranking says.
    assert kept(request) == [[0, *range(21 - count, 20)] for count in request.state.plan.kept_counts]


@TWO_ONLY
def test_the_second_step_ranks_what_the_first_kept(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    request = world.add(text=1, prompt=40)
    prefill(world, request)
    first, second = kept(request)
    assert set(second) < set(first) and first[-WINDOW:] == second[-WINDOW:] == list(range(36, 40))
    assert [len(r) for r in world.rankings] == [40 - WINDOW, len(first) - WINDOW]
    # Not the best of the first ranking over again: other layers have been asked.
    again = torch.sort(world.rankings[0][1:], descending=True).indices[: len(second) - WINDOW - 1] + 1
    assert first[0] == second[0] == 0 and set(second[1:-WINDOW]) != set(again.tolist())
    listed = [world.table[request.row + i * STRIDE].tolist() for i in (1, 2)]
    assert listed[1][: len(second)] == [listed[0][first.index(p)] for p in second]


@TWO_ONLY
def test_views_are_prepared_once_their_rows_are_known(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    request = world.add(text=1, prompt=20)
    prefill(world, request)
    assert [level for _, level in world.prepared] == [1, 2]
    assert [view.seq_lens.tolist() for view, _ in world.prepared] == [[10], [5]]
    world.decode([request])
    assert [level for _, level in world.prepared] == [1, 2]
    assert [view.seq_lens.tolist() for view, _ in world.prepared] == [[11], [6]]


# --- any schedule ---


@STEPS
@RESTRICTED
@pytest.mark.parametrize("seed", range(12))
def test_random_schedules(steps: tuple[PruneStep, ...], seed: int, dense_layers: int | None) -> None:
    world = World(steps, seed, dense_layers=dense_layers)
    rng = world.rng
    live: list[Request] = []
    for _ in range(25):
        while len(live) < 5:
            live.append(_random_request(world, live))
        waiting = [r for r in live if r.length < r.total]
        ready = [r for r in live if r.length == r.total and r.total < WIDTH - 1]
        if waiting and rng.random() < 0.6:
            batch = rng.sample(waiting, rng.randint(1, len(waiting)))
            chunks = []
            for request in batch:
                left = request.total - request.length
                length = rng.randint(1, left) if rng.random() < 0.5 else left
                chunks.append((request, chunk_len(length, left, WINDOW) if request.pruned else length))
            chunks = [(r, n) for r, n in chunks if n]
            late_rows = rng.choice([None, None, 1 if len(steps) == 1 else 5, WINDOW, 11])
            if late_rows is not None:  # only one prompt may end in a step that may part it
                ending = [(r, n) for r, n in chunks if r.pruned and r.length + n == r.total]
                chunks = [chunk for chunk in chunks if chunk not in ending[1:]]
            if any(r.pruned for r, _ in chunks):
                world.extend(chunks, late_rows)
                check(world, [r for r, _ in chunks])
        elif any(r.pruned for r in ready):
            batch = rng.sample(ready, len(ready))
            world.decode(batch)
            check(world, batch)
        if rng.random() < 0.2:
            index = rng.randrange(len(live))
            live[index] = world.retract(live[index])
        if rng.random() < 0.15:
            world.release(live.pop(rng.randrange(len(live))))
        assert world.owned_twice() == []
    for request in live:
        world.release(request)
    assert world.slots.held == 0


def _random_request(world: World, live: list[Request]) -> Request:
    rng = world.rng
    pruned = rng.random() < 0.7
    prompt = rng.randint(1, 40)
    request = world.add(rng.randrange(3), prompt, pruned, rng.choice([None, None, 0.8, 1.0, 0.01]))
    donors = [r for r in live if r.pruned == pruned and r.text == request.text]
    if donors and rng.random() < 0.6:
        donor = rng.choice(donors)
        # A hit leaves the window to be computed.
        if (longest := min(donor.length, prompt - (WINDOW if pruned else 1))) > 0:
            world.hit(request, donor, rng.randint(1, longest))
    return request


@STEPS
@pytest.mark.parametrize(
    ("page", "dense_layers"), [(1, None), (4, None), (1, 0), (1, 2)], ids=["", "pages of 4", "none", "two"]
)
def test_generated_tokens_beside_chunks_of_others(
    steps: tuple[PruneStep, ...], page: int, dense_layers: int | None
) -> None:
    """As with `--enable-mixed-chunk`: rows of a prefill forward that decode, at every level."""
    world = World(steps, page=page, dense_layers=dense_layers)
    pruned, dense, alone = world.add(text=1, prompt=30), world.add(text=4, prompt=9, pruned=False), world.add(1, 30)
    world.extend([(pruned, 30), (dense, 9)], late_rows=7)
    while pruned.length < pruned.total:  # its late prefill takes several steps
        world.extend([(pruned, pruned.total - pruned.length)], late_rows=7)
    world.extend([(alone, 30)])
    coming = world.add(text=2, prompt=40)
    for chunk in (12, 28):
        out = world.extend([(coming, chunk)], decoding=[pruned, dense])
        check(world, [coming, pruned, dense])
        assert out[pruned].tolist() == world.decode([alone]).tolist() == rows(1, [pruned.length - 1])
        assert out[dense].tolist() == rows(4, [dense.length - 1])
    assert out[coming][-1:].tolist() == rows(2, [39])
    world.decode([coming, pruned, dense])
    check(world, [coming, pruned, dense])
    assert world.owned_twice() == []
