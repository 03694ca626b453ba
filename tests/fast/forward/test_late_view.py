"""The late view: which fields it rewrites, and which batch it must not touch."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from claa_sglang.forward.batch_plan import Segment
from claa_sglang.forward.late_view import make_view, on_device, write_slots

STRIDE, WIDTH = 10, 16
# Slot of row r, column c: 100 * r + c.
TABLE = (100 * torch.arange(2 * STRIDE)[:, None] + torch.arange(WIDTH)).to(torch.int32)


def make_batch() -> SimpleNamespace:
    """The early batch of three requests: 5 of 12, 3 of 3 and 4 of 4 tokens."""
    return SimpleNamespace(
        batch_size=3,
        req_pool_indices=torch.tensor([3, 4, 5], dtype=torch.int32),
        req_pool_indices_cpu=torch.tensor([3, 4, 5]),
        seq_lens=torch.tensor([12, 3, 4], dtype=torch.int32),
        orig_seq_lens=torch.tensor([12, 3, 4], dtype=torch.int32),
        seq_lens_cpu=torch.tensor([12, 3, 4]),
        seq_lens_sum=19,
        max_seq_len_host=12,
        out_cache_loc=torch.arange(12),
        positions=torch.arange(12),
        input_ids=torch.arange(12, dtype=torch.int32),
        extend_seq_lens=torch.tensor([5, 3, 4], dtype=torch.int32),
        extend_prefix_lens=torch.tensor([7, 0, 0], dtype=torch.int32),
        extend_start_loc=torch.tensor([0, 5, 8], dtype=torch.int32),
        extend_seq_lens_cpu=[5, 3, 4],
        extend_prefix_lens_cpu=[7, 0, 0],
        extend_num_tokens=12,
        global_num_token_non_padded_cpu=12,
        return_logprob=True,
        residual_stream=object(),
        sampling_info="kept",
    )


# A pruned request with 6 kept tokens, and a dense one in the middle of its prompt; the third is left out.
EXTEND = (Segment(0, 0, 6, STRIDE + 3, 0, 6, None, True), Segment(1, 6, 9, 4, 2, 5, None, False))
DECODE = (Segment(0, 0, 1, STRIDE + 3, 6, 7, None, True), Segment(1, 1, 2, 4, 3, 4, None, True))


def test_a_prefill_view() -> None:
    view = make_view(make_batch(), EXTEND, TABLE, decode=False)
    assert view.batch_size == 2
    assert view.req_pool_indices.tolist() == [13, 4] and view.req_pool_indices.dtype == torch.int32
    assert view.req_pool_indices_cpu.tolist() == [13, 4]
    assert view.seq_lens.tolist() == view.seq_lens_cpu.tolist() == view.orig_seq_lens.tolist() == [6, 5]
    assert view.seq_lens.dtype == torch.int32 and view.seq_lens_cpu.device.type == "cpu"
    assert view.seq_lens_sum == 11 and view.max_seq_len_host == 6
    assert view.extend_seq_lens.tolist() == view.extend_seq_lens_cpu == [6, 3]
    assert view.extend_prefix_lens.tolist() == view.extend_prefix_lens_cpu == [0, 2]
    assert view.extend_start_loc.tolist() == [0, 6]
    assert view.extend_num_tokens == view.global_num_token_non_padded_cpu == 9
    assert view.input_ids.shape == (9,) and view.input_ids.dtype == torch.int32
    assert view.out_cache_loc.tolist() == [1300, 1301, 1302, 1303, 1304, 1305, 402, 403, 404]
    assert view.out_cache_loc.dtype == torch.int64
    assert view.residual_stream is None and view.return_logprob is False
    assert view.sampling_info == "kept"


def test_a_decode_view_writes_to_the_last_column() -> None:
    batch = make_batch()
    view = make_view(batch, DECODE, TABLE, decode=True)
    assert view.batch_size == 2 and view.residual_stream is None
    assert view.req_pool_indices.tolist() == [13, 4] and view.seq_lens.tolist() == view.seq_lens_cpu.tolist() == [7, 4]
    assert view.seq_lens_sum == 11 and view.max_seq_len_host == 7
    assert view.out_cache_loc.tolist() == [1306, 403] and view.out_cache_loc.dtype == torch.int64
    assert view.positions is batch.positions


@pytest.mark.parametrize(("segments", "decode"), [(EXTEND, False), (DECODE, True)], ids=["prefill", "decode"])
def test_the_early_batch_and_the_table_stay_as_they_were(segments: tuple[Segment, ...], decode: bool) -> None:
    batch, table = make_batch(), TABLE.clone()
    fields = dict(vars(batch))
    before = copy.deepcopy({k: v for k, v in fields.items() if k != "residual_stream"})
    view = make_view(batch, segments, table, decode=decode)
    view.out_cache_loc.zero_()
    view.seq_lens.zero_()
    view.req_pool_indices.zero_()
    assert all(getattr(batch, name) is value for name, value in fields.items())
    for name, value in before.items():
        now = getattr(batch, name)
        assert torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value, name
    assert torch.equal(table, TABLE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_dtypes_follow_the_early_batch(dtype: torch.dtype) -> None:
    batch = make_batch()
    batch.seq_lens, batch.req_pool_indices = batch.seq_lens.to(dtype), batch.req_pool_indices.to(dtype)
    view = make_view(batch, EXTEND, TABLE, decode=False)
    assert view.seq_lens.dtype == view.req_pool_indices.dtype == dtype
    assert view.extend_seq_lens.dtype == view.extend_prefix_lens.dtype == view.extend_start_loc.dtype == torch.int32


def test_write_slots_are_what_the_rows_list() -> None:
    assert write_slots(EXTEND[1:], TABLE).tolist() == [402, 403, 404]
    assert write_slots(EXTEND, TABLE).dtype == torch.int64


def test_on_device_keeps_rows_apart() -> None:
    first, second = on_device([[1, 2], [3, 4]], torch.int32, torch.device("cpu"))
    assert first.tolist() == [1, 2] and second.tolist() == [3, 4] and first.dtype == torch.int32
