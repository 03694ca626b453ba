"""Static buffers of captured decode graphs: what a replay reads is what the batch plan says, padding included."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import torch

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.batch_plan import plan_decode
from claa_sglang.forward.graph_decode import DecodeBuffers
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

STRIDE, WIDTH, STEPS = 8, 64, 2
STEP_LIST = [
    {"prune_layer": 3, "keep_rate": 0.5, "score_layers": [3]},
    {"prune_layer": 5, "keep_rate": 0.25, "score_layers": [5]},
]
CONFIG = msgspec.convert({"steps": STEP_LIST, "num_layers": 8, "window": 2}, ClaaConfig)


@pytest.fixture
def table() -> torch.Tensor:
    """Every entry names its own place, so that a wrong row or column shows."""
    return torch.arange((STEPS + 1) * STRIDE * WIDTH, dtype=torch.int32).view(-1, WIDTH)


def batch(rows: list[int], lens: list[int], padded_to: int, slots: list[int]) -> SimpleNamespace:
    """SGLang's stand-in at replay: padded rows are row 0 with length 1, write slots are not padded."""
    padding = padded_to - len(rows)
    return SimpleNamespace(
        batch_size=padded_to,
        req_pool_indices=torch.tensor(rows + [0] * padding),
        seq_lens=torch.tensor(lens + [1] * padding),
        out_cache_loc=torch.tensor(slots),
    )


def test_a_pruned_request_reads_and_writes_its_late_rows(table: torch.Tensor) -> None:
    pruned = RequestState.pruned_request(RequestOptions(), CONFIG, prompt_tokens=20)  # keeps 10, then 5
    rows, lens, slots = [3, 5], [23, 30], [101, 102]
    plan = plan_decode([pruned, None], rows=rows, seq_lens=lens, table_stride=STRIDE, num_steps=STEPS)
    assert plan is not None
    buffers = DecodeBuffers(STEPS, 6, torch.device("cpu"))
    host = buffers.fill(stand_in := batch(rows, lens, 4, slots), plan)
    buffers.find_slots(table, 4, stand_in.out_cache_loc)

    # 3 generated tokens follow the kept ones; the dense request is where stock has it, at both levels.
    assert buffers.rows[:, :4].tolist() == [[STRIDE + 3, 5, 0, 0], [2 * STRIDE + 3, 5, 0, 0]]
    assert buffers.lens[:, :4].tolist() == [[13, 30, 1, 1], [8, 30, 1, 1]]
    assert [level.tolist() for level in host] == buffers.lens[:, :4].tolist()
    expected = [
        [table[STRIDE + 3, 12], table[5, 29], table[0, 0], table[0, 0]],
        [table[2 * STRIDE + 3, 7], table[5, 29], table[0, 0], table[0, 0]],
    ]
    assert buffers.slots[:, :4].tolist() == [[int(slot) for slot in level] for level in expected]
    # Only the pruned request's boundary state is kept; the others' go to the slot nobody reads.
    assert buffers.boundary[:4].tolist() == [101, 0, 0, 0]


def test_early_layers_that_read_kept_tokens_have_a_view_of_their_own() -> None:
    table = torch.arange((STEPS + 2) * STRIDE * WIDTH, dtype=torch.int32).view(-1, WIDTH)
    config = msgspec.structs.replace(CONFIG, decode_dense_layers=2)
    restricted = RequestState.pruned_request(RequestOptions(), config, prompt_tokens=20)  # keeps 10
    not_so = RequestState.pruned_request(RequestOptions(decode_dense_layers=4), config, prompt_tokens=20)
    rows, lens, slots = [3, 5, 6], [23, 30, 21], [101, 102, 103]
    buffers = DecodeBuffers(STEPS + 1, 6, torch.device("cpu"))
    for states in ([restricted, None, not_so], [not_so, None, not_so]):
        plan = plan_decode(states, rows=rows, seq_lens=lens, table_stride=STRIDE, num_steps=STEPS)
        assert plan is not None
        host = buffers.fill(stand_in := batch(rows, lens, 4, slots), plan)
        buffers.find_slots(table, 4, stand_in.out_cache_loc)
        first = [(STEPS + 1) * STRIDE + 3, 13] if states[0] is restricted else [3, 23]
        assert buffers.rows[STEPS, :4].tolist() == [first[0], 5, 6, 0]
        assert buffers.lens[STEPS, :4].tolist() == host[STEPS].tolist() == [first[1], 30, 21, 1]
        assert buffers.slots[STEPS, :3].tolist() == [
            int(table[first[0], first[1] - 1]),
            int(table[5, 29]),
            int(table[6, 20]),
        ]


def test_a_dense_batch_is_stocks_own_at_every_level(table: torch.Tensor) -> None:
    buffers = DecodeBuffers(STEPS, 6, torch.device("cpu"))
    buffers.boundary.fill_(77)  # left by the replay before
    stand_in = batch([2, 4], [9, 11], 3, [201, 202])
    buffers.fill_dense(stand_in)
    buffers.find_slots(table, 3, stand_in.out_cache_loc)
    for level in range(STEPS):
        assert buffers.rows[level, :3].tolist() == [2, 4, 0]
        assert buffers.lens[level, :3].tolist() == [9, 11, 1]
        assert buffers.slots[level, :2].tolist() == [int(table[2, 8]), int(table[4, 10])]
    assert buffers.boundary[:3].tolist() == [0, 0, 0]


def test_views_are_windows_of_the_buffers() -> None:
    buffers = DecodeBuffers(STEPS, 6, torch.device("cpu"))
    view = buffers.view(batch([2], [9], 4, [201]), level=2)
    assert view.out_cache_loc.data_ptr() == buffers.slots[1].data_ptr() and view.out_cache_loc.shape == (4,)
    assert view.seq_lens.data_ptr() == buffers.lens[1].data_ptr()
    assert view.req_pool_indices.data_ptr() == buffers.rows[1].data_ptr()
