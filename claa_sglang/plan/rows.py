"""A plan: stock and pruned beside each other, for several prune layers and keep rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from claa_sglang.plan.machine import Machine
from claa_sglang.plan.model import Shape
from claa_sglang.plan.pays_from import pays_from
from claa_sglang.plan.predict import Predictor, Prune
from claa_sglang.plan.room import need, pool_slots


class Asked(NamedTuple):
    """What is planned for. prompt, question, answer: tokens of a prompt, of a later question over it, of an answer.

    chunk: tokens of a prefill step. pool: KV slots of the server; None to reckon them from `fraction`, the share of
    memory that weights and KV have.
    """

    prompt: int
    question: int
    answer: int
    chunk: int
    pool: int | None
    fraction: float


class Stock(NamedTuple):
    """Without pruning. ttft, second_turn: seconds. slots, bytes: of a request. fit: requests at once, None if the
    memory is not known."""

    ttft: float
    second_turn: float
    slots: int
    bytes: int
    fit: int | None


class Row(NamedTuple):
    """With it. ttft, second_turn: seconds, and as multiples of stock's. late_slots: on top of stock's slots.
    pays_from: prompt tokens from which on TTFT is below stock's, None for no length that the model takes."""

    prune_layer: int
    keep_rate: float
    ttft: float
    ttft_of_stock: float
    second_turn: float
    second_turn_of_stock: float
    late_slots: int
    bytes: int
    fit: int | None
    pays_from: int | None


class Plan(NamedTuple):
    """pool: KV slots that requests share, None if not known."""

    pool: int | None
    stock: Stock
    rows: tuple[Row, ...]


def plan(shape: Shape, machine: Machine, asked: Asked, prunes: Sequence[Prune]) -> Plan:
    """All of it, in the order of `prunes`."""
    predictor = Predictor(machine, shape, asked.chunk)
    pool = asked.pool if asked.pool is not None else pool_slots(shape, machine, asked.fraction)
    end = asked.prompt + asked.question
    taken = need(shape, machine.itemsize, asked.prompt, asked.answer)
    stock = Stock(
        ttft=predictor.dense(0, asked.prompt),
        second_turn=predictor.dense(asked.prompt, end),
        slots=taken.slots,
        bytes=taken.bytes,
        fit=None if pool is None else pool // taken.slots,
    )

    def row(prune: Prune) -> Row:
        taken = need(shape, machine.itemsize, asked.prompt, asked.answer, prune)
        first, second = predictor.pruned(0, asked.prompt, prune), predictor.pruned(asked.prompt, end, prune)
        return Row(
            prune_layer=prune.prune_layer,
            keep_rate=prune.keep_rate,
            ttft=first,
            ttft_of_stock=first / stock.ttft,
            second_turn=second,
            second_turn_of_stock=second / stock.second_turn,
            late_slots=taken.late,
            bytes=taken.bytes,
            fit=None if pool is None else pool // taken.slots,
            pays_from=pays_from(predictor, prune, shape.context),
        )

    return Plan(pool, stock, tuple(row(prune) for prune in prunes))
