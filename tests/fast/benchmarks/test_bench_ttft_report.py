"""What the TTFT benchmark claims follows from its samples, and from the right ones; and how it is shown."""

from __future__ import annotations

import io
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from benchmarks.ttft import catalogue, plot, report, targets, variants
from benchmarks.ttft.settings import GPU_DEFAULTS
from benchmarks.ttft.variants import PER_TOKEN, STOCK, TTFT
from tests.fast.ttft_records import PRUNED, fill, full_record, record, row


def test_a_ratio_is_taken_within_rounds() -> None:
    made = record()
    # The machine became ten times slower for a round: the ratio of medians would be 6 / 10 or 0.6 / 1, or anything.
    fill(made, "cold", 10_240, TTFT, stock=[1.0, 10.0, 1.0, 10.0], pruned=[0.6, 6.0, 0.6, 7.0])
    of_stock = row(made, PRUNED).of_stock
    assert of_stock and (of_stock.median, of_stock.low, of_stock.high) == pytest.approx((0.6, 0.6, 0.7))
    assert row(made, STOCK).of_stock is None


def test_cold_is_held_against_its_bound_and_its_target() -> None:
    made = record()
    fill(made, "cold", 10_240, TTFT, stock=[0.280] * 5, pruned=[0.172] * 5)
    fill(made, "cold", 10_240, TTFT, early=[0.142] * 5, late=[0.029] * 5, one=[0.002] * 5)
    pruned = row(made, PRUNED)
    assert pruned.bound == pytest.approx(0.142 + 16 / 15 * 0.027)
    assert pruned.of_bound and pruned.of_bound.median == pytest.approx(0.172 / 0.1708)
    assert pruned.plain_sum == pytest.approx(0.171)
    assert pruned.verdicts == {targets.OF_STOCK: ("at most 0.61", False), targets.OF_BOUND: ("at most 1.02", True)}
    assert row(made, STOCK).verdicts == {}


def test_stock_is_held_against_its_own_parts() -> None:
    made = record()
    fill(made, "cold", 10_240, TTFT, stock=[0.280, 0.290], early=[0.140, 0.141], one_N=[0.020, 0.021])
    stock, parts = row(made, STOCK), 0.140 + 16 / 15 * 0.120
    assert stock.bound == pytest.approx(parts + 0.0005)
    assert stock.of_bound and stock.of_bound.low == pytest.approx(0.280 / parts)
    assert row(made, variants.EARLY).bound is None


def test_what_the_server_chose_is_held_against_stock_and_the_bound() -> None:
    made = record()
    fill(
        made,
        "cold",
        10_240,
        TTFT,
        stock=[0.280],
        pruned=[0.170],
        auto=[0.281],
        early=[0.142],
        late=[0.029],
        one=[0.002],
    )
    fill(made, "cold", 10_240, variants.PRUNED_TURNS, auto=[0.0])
    time, pruned = (line for line in report.rows(made) if line.variant == variants.auto(0.2))
    assert time.of_stock and time.of_stock.median == pytest.approx(0.281 / 0.280)
    assert time.bound == row(made, PRUNED).bound and time.verdicts == {}
    assert (pruned.value.median, pruned.of_stock, pruned.bound) == (0.0, None, None)


def test_helpers_of_the_bound_have_no_line() -> None:
    made = record()
    fill(made, "cold", 10_240, TTFT, stock=[1.0], early=[1.0], late=[1.0], one=[1.0], one_N=[1.0])
    assert [line.variant for line in report.rows(made)] == [STOCK, variants.EARLY]


def test_no_samples_of_a_bound_no_bound() -> None:
    made = record()
    fill(made, "cold", 10_240, TTFT, stock=[1.0], pruned=[0.5], early=[0.4])
    assert (row(made, PRUNED).bound, row(made, PRUNED).of_bound) == (None, None)


def test_second_turn_may_take_its_late_layers_on_top_of_stock() -> None:
    made = record()
    late = 16 / 15 * 0.086
    fill(made, "second-turn", 32_768, TTFT, stock=[0.036], late=[0.088], one=[0.002])
    fill(made, "second-turn", 32_768, TTFT, pruned=[0.036 + 1.1 * late - 1e-6])
    assert row(made, PRUNED).verdicts == {targets.OF_BOUND: ("at most 1", True)}
    made.series[-1].samples[0] += 1e-5
    assert row(made, PRUNED).verdicts == {targets.OF_BOUND: ("at most 1", False)}


@pytest.mark.parametrize(("ratio", "met"), [(0.98, False), (0.995, True), (1.02, False)])
def test_dense_may_be_neither_slower_nor_faster(ratio: float, met: bool) -> None:
    made = record()
    fill(made, "dense", 10_240, TTFT, stock=[1.0], dense=[ratio])
    assert row(made, variants.DENSE).verdicts == {targets.OF_STOCK: ("0.99 to 1.01", met)}


@pytest.mark.parametrize(("more", "met"), [(1.9, True), (2.1, False)])
def test_start_is_judged_by_the_difference_of_medians(more: float, met: bool) -> None:
    made = record()
    for seconds, variant in ((30.0, STOCK), (30.0 + more, variants.CLAA)):
        made.add({"scenario": "startup", "tokens": 0, "chunk": 8192}, {(variants.START, variant): seconds})
    assert row(made, variants.CLAA).verdicts == {targets.SECONDS: ("at most 2", met)}


def test_targets_are_those_of_one_shape() -> None:
    made = record(model="qwen3-8b")
    fill(made, "cold", 10_240, TTFT, stock=[1.0], pruned=[0.9])
    assert row(made, PRUNED).verdicts == {}


def test_every_target_can_be_reached_by_a_default_run_or_is_named_so() -> None:
    own_runs = [("decode", 65_536), ("decode", 131_072)]  # they need room that a default run does not have
    for target in targets.TARGETS:
        if target.scenario != "startup" and target.tokens and (target.scenario, target.tokens) not in own_runs:
            assert target.tokens in catalogue.SCENARIOS[target.scenario].points(GPU_DEFAULTS)


def test_decoding_reports_its_share_of_the_bandwidth() -> None:
    made = record()
    fill(made, "decode", 65_536, variants.per_token(8), stock=[0.0250, 0.0251], pruned=[0.0150, 0.0151])
    stock, pruned = row(made, STOCK), row(made, PRUNED)
    assert stock.bandwidth_share == pytest.approx(stock.step_bytes / 0.02505 / 4e12)
    assert pruned.step_bytes == pytest.approx(15.0e9 + 0.6 * (stock.step_bytes - 15.0e9), rel=0.01)
    fill(made, "decode", 65_536, variants.per_token(4), stock=[0.0150])
    half = report.rows(made)[-1]
    assert half.step_bytes and half.step_bytes - 15.0e9 == pytest.approx((stock.step_bytes - 15.0e9) / 2, rel=0.01)
    made.series.pop()
    assert row(msgspec.structs.replace(made, bandwidth=None), STOCK).bandwidth_share is None
    two = msgspec.structs.replace(made, settings={**made.settings, "tp_size": 2})
    assert row(two, STOCK).bandwidth_share == pytest.approx(stock.bandwidth_share / 2)  # each rank reads its part


def test_early_layers_that_decode_over_kept_tokens_read_less() -> None:
    made = record()
    made.settings["decode_dense_layers"] = 4
    fill(made, "decode", 131_072, variants.per_token(8), stock=[0.040], pruned=[0.026])
    key = {"scenario": "decode", "tokens": 131_072, "chunk": 8192}
    made.add(key, {(variants.per_token(8), variants.over_kept(0.2)): 0.017})
    stock, pruned, over_kept = (row(made, name) for name in (STOCK, PRUNED, variants.over_kept(0.2)))
    weights = 15.0e9
    shares = [(one.step_bytes - weights) / (stock.step_bytes - weights) for one in (pruned, over_kept)]
    assert shares == pytest.approx([(16 + 0.2 * 16) / 32, (4 + 0.2 * 28) / 32], rel=0.01)
    assert over_kept.verdicts == {targets.OF_STOCK: ("at most 0.45", True)}


def test_files_of_one_batch_are_read_as_ever() -> None:
    made = record()
    made.settings["decode_batch"] = 8
    fill(made, "decode", 65_536, PER_TOKEN, stock=[0.0250], pruned=[0.0150])
    assert row(made, PRUNED).verdicts == {targets.OF_STOCK: ("at most 0.75", True)}
    assert row(made, STOCK).step_bytes == pytest.approx(83.5e9 + 8 * 64.5 * 131_072, rel=0.01)


def test_the_table_has_every_claim() -> None:
    out = io.StringIO()
    report.print_record(full_record(), Console(file=out, width=160))
    text = out.getvalue()
    for words in ("4,096", "of bound", "0.618", "rates", "incomplete: out of time"):
        assert words in text
    assert "target" not in text  # no target at these lengths, so no such column


@pytest.mark.parametrize(("scheduler", "verdict"), [(0.7, "2.00 s"), (0.8, "2.10 s")])
def test_the_plugins_own_start_is_the_sum_of_its_processes(scheduler: float, verdict: str) -> None:
    out = io.StringIO()
    made = record(
        claa={
            "startup_seconds": {"server": 1.3, "scheduler": scheduler},
            "startup_parts": {"server": {"flags": 0.1, "imports": 1.2}},
        }
    )
    report.print_record(made, Console(file=out, width=160))
    assert f"{verdict} (server 1.30 + scheduler {scheduler:.2f})" in out.getvalue()
    assert "server: imports 1.20, flags 0.10" in out.getvalue()
    assert ("missed" in out.getvalue()) == (scheduler == 0.8)


def test_the_figure_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    assert plot.draw(full_record(), path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    assert not plot.draw(record(), tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
