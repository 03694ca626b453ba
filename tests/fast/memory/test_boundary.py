"""Boundary states in KV rows: both layouts, every awkward width, and nobody else's rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from claa_sglang.memory.boundary import BoundaryStore, BoundaryTooWide

SLOTS = 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_buffers(widths: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Buffers of given elements per slot, as heads x head_dim where the width is even."""
    shapes = [(SLOTS, 2, w // 2) if w % 2 == 0 else (SLOTS, 1, w) for w in widths]
    return [torch.full(shape, -7.0, dtype=dtype) for shape in shapes]


def bits(tensor: Tensor) -> Tensor:
    """The bytes: NaN equals itself, and -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8)


def random_bits(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern at all: NaNs, infinities and denormals are states like others."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (rows, width * size), dtype=torch.uint8, generator=generator)
    return raw.view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 23),
    widths=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    slots=st.lists(st.integers(0, SLOTS - 1), unique=True, min_size=1),
    seed=st.integers(0, 99),
)
def test_states_come_back_and_other_slots_stay(
    dtype: torch.dtype, hidden: int, widths: list[int], slots: list[int], seed: int
) -> None:
    buffers = make_buffers(widths, dtype)
    if sum(widths) < hidden:
        with pytest.raises(BoundaryTooWide):
            BoundaryStore(buffers, hidden, dtype)
        return
    store = BoundaryStore(buffers, hidden, dtype)
    assert store.is_pair == (sum(widths) >= 2 * hidden)
    h, r = (random_bits(len(slots), hidden, dtype, seed + i) for i in range(2))
    index = torch.tensor(slots)
    store.store(index, h, r)

    got_h, got_r = store.load(index)
    assert got_h.is_contiguous() and got_r.is_contiguous() and got_h.dtype == got_r.dtype == dtype
    if store.is_pair:
        assert torch.equal(bits(got_h), bits(h)) and torch.equal(bits(got_r), bits(r))
    else:
        assert torch.equal(bits(got_h), bits(h + r)) and not got_r.any()
    # Another order, and one row alone.
    assert torch.equal(bits(store.load(index.flip(0))[0]), bits(got_h.flip(0)))
    assert torch.equal(bits(store.load(index[:1])[1]), bits(got_r[:1]))

    others = [s for s in range(SLOTS) if s not in slots]
    used = 0
    for buffer, width in zip(buffers, widths, strict=True):
        assert bool((buffer[others] == -7.0).all())
        # Nothing past the state's last element is written.
        spare = max(0, width - max(0, (hidden * (2 if store.is_pair else 1)) - used))
        assert bool((buffer.view(SLOTS, -1)[:, width - spare :] == -7.0).all())
        used += width


def test_the_pair_keeps_what_a_sum_would_round_away() -> None:
    h, r = torch.full((1, 4), 1e-3).bfloat16(), torch.full((1, 4), 100.0).bfloat16()
    store = BoundaryStore(make_buffers([8], torch.bfloat16), 4, torch.bfloat16)
    store.store(torch.tensor([3]), h, r)
    got_h, got_r = store.load(torch.tensor([3]))
    assert torch.equal(got_h, h) and torch.equal(got_r, r) and torch.equal(h + r, r)


def test_a_later_state_replaces_the_earlier() -> None:
    store = BoundaryStore(make_buffers([3, 3, 4]), 5, torch.float32)
    for value in (1.0, 2.0):
        store.store(torch.tensor([4, 1]), torch.full((2, 5), value), torch.full((2, 5), -value))
    h, r = store.load(torch.tensor([1, 4]))
    assert bool((h == 2).all()) and bool((r == -2).all())


def test_loaded_states_are_copies() -> None:
    # Late layers overwrite their input in place, and the slot's state is still wanted.
    store = BoundaryStore(make_buffers([10]), 5, torch.float32)
    store.store(torch.tensor([2]), torch.ones(1, 5), torch.ones(1, 5))
    for tensor in store.load(torch.tensor([2])):
        tensor.zero_()
    assert all(bool((tensor == 1).all()) for tensor in store.load(torch.tensor([2])))


def test_no_slots_is_fine() -> None:
    buffers = make_buffers([10])
    store = BoundaryStore(buffers, 5, torch.float32)
    none = torch.empty(0, dtype=torch.int64)
    store.store(none, torch.empty(0, 5), torch.empty(0, 5))
    assert store.load(none)[0].shape == (0, 5) and bool((buffers[0] == -7).all())


def test_too_narrow_says_what_to_do() -> None:
    with pytest.raises(
        BoundaryTooWide, match="hold 6 elements, a hidden state has 7; prune earlier .--claa-prune-layer"
    ):
        BoundaryStore(make_buffers([2, 4]), 7, torch.float32)


def test_another_dtype_is_refused() -> None:
    # An fp8 KV cache would round the states.
    with pytest.raises(ValueError, match="dtype torch.float32"):
        BoundaryStore([*make_buffers([64]), *make_buffers([64], torch.bfloat16)], 4, torch.float32)
