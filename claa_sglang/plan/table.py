"""A plan as text, with the formula it was made by."""

from __future__ import annotations

from claa_sglang.plan.machine import Machine
from claa_sglang.plan.model import Shape
from claa_sglang.plan.rows import Asked, Plan, Row

# Each line of the formula, for people; `predict.py` and `room.py` are it.
FORMULA = (
    "A layer over some tokens takes: its bytes / bandwidth + 2 FLOP for each weight and token / matmul speed",
    "  + 4 FLOP for each element of a query and each earlier token / attention speed.",
    "Stock: every layer, over every token. Pruned: layers up to the prune layer over every token, the others over what",
    "  is kept. A second turn: early layers over the question alone, late layers over what is kept of all of it.",
    "The host launches layer after layer, and the GPU computes meanwhile: the longer way through both counts.",
    "A request pays its fixed time and the output matrix once. Scoring and ranking are in what launching takes.",
    "Slots: prompt + answer; pruned, as many again for kept tokens + answer. Fit: pool / slots of a request.",
)
HEADS = (
    *("prune layer", "keep rate", "TTFT", "of stock", "2nd turn", "of stock"),
    *("late slots", "memory", "fit", "pays from"),
)


def text(shape: Shape, machine: Machine, asked: Asked, plan: Plan) -> str:
    """The table, what it is of, and the formula."""
    stock = plan.stock
    pool = "unknown: give --max-total-tokens" if plan.pool is None else f"{plan.pool:,} slots"
    lines = [
        f"{shape.name} ({shape.family}, {shape.layers} layers, {shape.weights / 1e9:.2f} B weights) in {machine.dtype}",
        f"Machine: {machine.device}; {machine.source or 'no source named'}",
        f"A prompt of {asked.prompt:,} tokens, a question of {asked.question:,} later, answers of {asked.answer:,}, "
        f"steps of {asked.chunk:,}",
        f"Pool for KV: {pool}",
        "",
    ]
    cells = [HEADS, _stock(plan), *(_row(row) for row in plan.rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADS))]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines += ["", "All times are predicted:", *FORMULA, "", *_trust(shape, machine)]
    if plan.pool is not None and plan.pool < stock.slots:
        lines.append("Not one request of this length fits: use a shorter one, or more memory.")
    return "\n".join(lines)


def _stock(plan: Plan) -> tuple[str, ...]:
    stock = plan.stock
    times = (seconds(stock.ttft), "1", seconds(stock.second_turn), "1")
    return ("stock", "", *times, "0", size(stock.bytes), _count(stock.fit), "")


def _row(row: Row) -> tuple[str, ...]:
    return (
        str(row.prune_layer),
        f"{row.keep_rate:g}",
        seconds(row.ttft),
        f"{row.ttft_of_stock:.3f}",
        seconds(row.second_turn),
        f"{row.second_turn_of_stock:.2f}",
        f"{row.late_slots:,}",
        size(row.bytes),
        _count(row.fit),
        "never" if row.pays_from is None else f"{row.pays_from:,}",
    )


def _trust(shape: Shape, machine: Machine) -> list[str]:
    """How far this may be off."""
    if machine.checked:
        told = "Held against measured times, ratios to stock that this record predicts were off by:"
        lines = [told, *machine.checked]
    else:
        lines = ["This record was not held against measured times: docs/results/plan.md says how others did."]
    if shape.head_dim != machine.head_dim:
        lines.append(
            f"Attention was measured with heads of {machine.head_dim}, this model has {shape.head_dim}: "
            "measure with --measure --model on the machine itself."
        )
    return lines


def seconds(value: float) -> str:
    """Milliseconds below ten seconds."""
    return f"{1000 * value:,.1f} ms" if value < 0.1 else f"{1000 * value:,.0f} ms" if value < 10 else f"{value:,.1f} s"


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def _count(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
