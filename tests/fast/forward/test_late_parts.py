"""A late prefill in several steps, one and two prune steps, against plain loops (late_world)."""

from __future__ import annotations

import pytest
import torch

from claa_sglang.config.config import PruneStep
from tests.fast.forward.test_late_pass import STEPS, TWO_ONLY, _one_thread, generate, kept, prefill, rows  # noqa: F401
from tests.fast.late_answers import check
from tests.fast.late_world import LAYERS, ONE_STEP, TWO_STEPS, WINDOW, World

# A chunk has at least the window, so that the second prune finds its queries in one part.
PARTS = [(ONE_STEP, rows) for rows in (1, 3, 7, 19)] + [(TWO_STEPS, rows) for rows in (WINDOW, 7, 19)]


@pytest.mark.parametrize(("steps", "late_rows"), PARTS, ids=[f"{len(s)}-steps-{rows}-rows" for s, rows in PARTS])
@pytest.mark.parametrize("keep_rate", [None, 1.0], ids=["half", "all"])
@pytest.mark.parametrize("hit", [0, 12], ids=["cold", "hit"])
@pytest.mark.parametrize("page", [1, 4], ids="pages of {}".format)
def test_parts_give_the_rows_of_a_whole(
    steps: tuple[PruneStep, ...], late_rows: int, keep_rate: float | None, hit: int, page: int
) -> None:
    world = World(steps, page=page)
    whole, parted = (world.add(text=3, prompt=40, keep_rate=keep_rate) for _ in range(2))
    out = prefill(world, whole)
    read = {layer: world.read[layer][whole.row] for layer in range(LAYERS)}
    if hit:
        world.hit(parted, whole, hit)
    forwards, left = [], 40 - hit
    last_read: dict[int, list] = {}
    while parted.length < parted.total:
        last = world.extend([(parted, left)], late_rows)[parted][-1]
        check(world, [parted])
        assert world.last is not None
        forwards.append([world.last.plan.rows(level + 1) for level in range(len(steps))])
        last_read |= {layer: rows[parted.row] for layer, rows in world.read.items() if parted.row in rows}
        left = parted.total - parted.length
        assert left in (0, page) and world.owned_twice() == []
    assert all(0 <= n <= late_rows for rows in forwards for n in rows)
    counts = [40, 40] if keep_rate else [20, 10]
    assert [sum(n) for n in zip(*forwards, strict=True)] == counts[: len(steps)]
    assert torch.equal(last, out[-1]) and kept(parted) == kept(whole) and last_read == read
    generate(world, parted, 3)


@STEPS
def test_parts_beside_other_requests(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    parted, dense, short = world.add(text=1, prompt=40), world.add(text=4, prompt=7, pruned=False), world.add(2, 9)
    world.extend([(parted, 40)], late_rows=12)
    world.extend([(parted, 1), (dense, 7), (short, 9)], late_rows=30)
    check(world, [parted, dense, short])
    world.decode([short, parted, dense])
    check(world, [parted, dense, short])


@TWO_ONLY
def test_a_part_after_the_second_prune_alone_beside_other_requests(steps: tuple[PruneStep, ...]) -> None:
    """Its rows are in the last level only, a dense request's in all."""
    world = World(steps)
    parted, dense, short = world.add(text=1, prompt=40), world.add(text=4, prompt=7, pruned=False), world.add(2, 9)
    for left in (40, 1, 1):
        world.extend([(parted, left)], late_rows=8)
    assert parted.state.progress.late_spans == [(16, 20), (0, 8)]
    world.extend([(parted, 1), (dense, 7)], late_rows=30)
    check(world, [parted, dense])
    assert world.last is not None and [world.last.plan.rows(level) for level in (1, 2)] == [7, 7 + 2]
    world.extend([(short, 9)], late_rows=30)
    out = world.decode([short, parted, dense])
    check(world, [parted, dense, short])
    assert out.tolist() == [[2, 9, LAYERS], [1, 40, LAYERS], [4, 7, LAYERS]]


@TWO_ONLY
def test_rows_after_the_second_prune_wait_where_the_step_has_no_room(steps: tuple[PruneStep, ...]) -> None:
    world = World(steps)
    parted, short = world.add(text=1, prompt=16, keep_rate=1.0), world.add(text=2, prompt=9)
    for left in (16, 1):
        world.extend([(parted, left)], late_rows=8)
    out = world.extend([(parted, 1), (short, 9)], late_rows=8)
    check(world, [parted, short])
    assert out[parted].tolist() == rows(1, [15]) and not out[short].any()
    # It was ranked all the same: its queries were there.
    assert short.state.progress.late_spans == [(0, 4), (0, 0)] and len(kept(short)) == 2
    assert world.extend([(short, 1)], late_rows=8)[short].tolist() == rows(2, [8])
    check(world, [short])
    world.decode([short, parted])
    check(world, [parted, short])


@STEPS
@pytest.mark.parametrize("parts", range(1, 4))
def test_a_request_retracted_between_its_parts_starts_them_again_with_what_it_kept(
    steps: tuple[PruneStep, ...], parts: int
) -> None:
    world = World(steps)
    request = world.add(text=1, prompt=40)
    for left in (40, 1, 1)[: min(parts, len(steps) + 1)]:
        world.extend([(request, left)], late_rows=8)
    assert request.length < request.total
    before = kept(request)
    resumed = world.retract(request)
    assert set(resumed.state.progress.late_spans) == {(0, 0)}
    prefill(world, resumed)
    assert kept(resumed)[: len(before)] == before and len(world.rankings) == len(steps) - len(before)
    generate(world, resumed, 2)
