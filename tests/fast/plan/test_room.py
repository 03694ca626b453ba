"""Slots, bytes and how many requests fit."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.plan.predict import Prune
from claa_sglang.plan.room import need, pool_slots, slot_bytes
from claa_sglang.plan.rows import Asked, plan
from tests.fast.plan.conftest import EIGHT_B, GPU

tokens = st.integers(1, 130_000)
rates = st.floats(0.01, 1.0)


def test_numbers_worked_out_by_hand() -> None:
    assert slot_bytes(EIGHT_B, 2) == 32 * 2 * 8 * 128 * 2 == 131_072
    assert need(EIGHT_B, 2, 10_000, 100) == (0, 10_100, 10_100 * 131_072)
    assert need(EIGHT_B, 2, 10_000, 100, Prune(15, 0.2)) == (2_100, 12_200, 12_200 * 131_072)
    assert need(EIGHT_B, 2, 100, 10, Prune(15, 0.2)).late == 32 + 10  # the window is kept at any rate


@given(tokens, tokens, st.integers(0, 1000), rates)
def test_memory_grows_with_the_prompt(one: int, other: int, answer: int, rate: float) -> None:
    short, long = sorted((one, other))
    few, many = (need(EIGHT_B, 2, length, answer, Prune(15, rate)) for length in (short, long))
    assert many.slots - few.slots >= long - short
    assert many.bytes - few.bytes >= (long - short) * slot_bytes(EIGHT_B, 2)


@given(tokens, st.integers(0, 1000), rates, rates)
def test_keeping_less_takes_less_and_never_less_than_stock(prompt: int, answer: int, one: float, other: float) -> None:
    stock = need(EIGHT_B, 2, prompt, answer)
    less, more = (need(EIGHT_B, 2, prompt, answer, Prune(15, rate)) for rate in sorted((one, other)))
    assert stock.slots < less.slots <= more.slots <= 2 * stock.slots


def test_a_pool_is_what_weights_leave() -> None:
    slots = pool_slots(EIGHT_B, GPU, 0.5)
    assert slots is not None and GPU.memory is not None
    taken = slots * slot_bytes(EIGHT_B, 2) + EIGHT_B.weights * 2
    assert 0 <= GPU.memory * 0.5 - taken < slot_bytes(EIGHT_B, 2)
    assert pool_slots(EIGHT_B, GPU, 0.01) == 0
    assert pool_slots(EIGHT_B, msgspec.structs.replace(GPU, memory=None), 0.5) is None


def test_requests_that_fit_fill_the_pool_and_no_more_do() -> None:
    asked = Asked(prompt=10_000, question=64, answer=100, chunk=8192, pool=50_000, fraction=0.85)
    made = plan(EIGHT_B, GPU, asked, [Prune(15, 0.2)])
    (row,) = made.rows
    assert (made.pool, made.stock.fit, row.fit) == (50_000, 4, 4)  # 50,000 / 10,100 and / 12,200
    assert plan(EIGHT_B, GPU, asked._replace(pool=48_799), [Prune(15, 0.2)]).rows[0].fit == 3
