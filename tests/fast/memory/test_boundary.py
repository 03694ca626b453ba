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
    if sum(widths) < hidden * (1 if dtype == torch.float32 else 2):
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_that_would_be_rounded_is_refused(dtype: torch.dtype) -> None:
    # 192 elements of K and of V a layer, as SmolLM2: after layer 27 there are two layers, after 26 three.
    for layers, fits in ((2, False), (3, True)):
        buffers = make_buffers([192, 192] * layers, dtype)
        if fits:
            assert BoundaryStore(buffers, 576, dtype).is_pair
        else:
            with pytest.raises(BoundaryTooWide, match="hold 768 elements, a boundary state has 1152"):
                BoundaryStore(buffers, 576, dtype)


def test_a_float32_sum_is_what_layers_make_of_the_pair() -> None:
    from sglang.srt.layers.layernorm import RMSNorm

    generator = torch.Generator().manual_seed(0)
    h, r = (torch.randn(5, 64, generator=generator) * scale for scale in (1e-3, 100.0))
    store = BoundaryStore(make_buffers([64]), 64, torch.float32)
    assert not store.is_pair
    store.store(torch.arange(5), h, r)
    norm = RMSNorm(64)
    want, got = (norm.forward_native(a.clone(), b.clone()) for a, b in ((h, r), store.load(torch.arange(5))))
    assert all(torch.equal(ours, stock) for ours, stock in zip(got, want, strict=True))


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
        BoundaryTooWide, match="hold 6 elements, a boundary state has 7; prune earlier .--claa-prune-layer"
    ):
        BoundaryStore(make_buffers([2, 4]), 7, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@given(hidden=st.integers(1, 23), widths=st.lists(st.integers(1, 9), min_size=8, max_size=8), seed=st.integers(0, 99))
def test_rows_of_8_bits_hold_states_bit_for_bit(dtype: torch.dtype, hidden: int, widths: list[int], seed: int) -> None:
    widths = [4 * 4 * width for width in widths]
    buffers = [random_bits(SLOTS, width, torch.float8_e4m3fn, seed).view(SLOTS, 4, -1) for width in widths]
    before = [bits(buffer).clone() for buffer in buffers]
    store = BoundaryStore(buffers, hidden, dtype)
    assert store.is_pair == (sum(widths) >= 2 * hidden * dtype.itemsize)
    h, r = (random_bits(3, hidden, dtype, seed + i) for i in range(2))
    slots = torch.tensor([7, 2, 10])
    store.store(slots, h, r)
    got_h, got_r = store.load(slots)
    kept = (h, r) if store.is_pair else (h + r, torch.zeros_like(r))
    assert torch.equal(bits(got_h), bits(kept[0])) and torch.equal(bits(got_r), bits(kept[1]))
    others = [slot for slot in range(SLOTS) if slot not in slots]
    assert all(torch.equal(bits(now)[others], was[others]) for now, was in zip(buffers, before, strict=True))


def test_rows_that_end_inside_an_element_are_refused() -> None:
    with pytest.raises(ValueError, match="part of an element"):
        BoundaryStore(make_buffers([7], torch.float8_e4m3fn), 1, torch.bfloat16)


def test_another_dtype_is_refused() -> None:
    # Rows of 16 bits would round states of 32.
    with pytest.raises(ValueError, match="dtype torch.float32"):
        BoundaryStore([*make_buffers([64]), *make_buffers([64], torch.bfloat16)], 4, torch.float32)
