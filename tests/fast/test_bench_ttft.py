"""The TTFT benchmark's arithmetic: what it claims follows from its samples, and from the right ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from benchmarks import bench_ttft, shapes
from benchmarks.ttft import plot, rates, report, run, scenarios, setup, targets, variants
from benchmarks.ttft.bound import Depth, bound_seconds, late_seconds, parts_seconds, step_bytes
from benchmarks.ttft.record import Record, load, save
from benchmarks.ttft.settings import CPU_DEFAULTS, GPU_DEFAULTS, HELP, Settings
from benchmarks.ttft.variants import PER_TOKEN, STOCK, TTFT, keep

LLAMA = shapes.SHAPES["llama-3.1-8b"]
PRUNED = keep(0.2)


def record(model: str = targets.SHAPE, **more: Any) -> Record:
    """A record of a run of the shape with the targets, without samples."""
    values = {
        "command": "python -m benchmarks.bench_ttft",
        "date": "2026-01-01 00:00 UTC",
        "model": model,
        "shape": LLAMA,
        "itemsize": 2,
        "device": "a GPU",
        "bandwidth": 4e12,
        "prune_layer": 15,
        "settings": msgspec.to_builtins(GPU_DEFAULTS),
        "versions": {"sglang": "0"},
    }
    return Record(**values | more)


def fill(into: Record, scenario: str, tokens: int, quantity: str, **samples: list[float]) -> None:
    """Add one round per value; NAMES says which variant a keyword stands for."""
    for name, values in samples.items():
        for value in values:
            into.add({"scenario": scenario, "tokens": tokens, "chunk": 8192}, {(quantity, NAMES[name]): value})


NAMES = {
    "stock": STOCK,
    "pruned": PRUNED,
    "early": variants.EARLY,
    "late": variants.late(0.2),
    "one": variants.one(0.2),
    "auto": variants.auto(0.2),
    "one_N": variants.ONE,
    "dense": variants.DENSE,
}


def row(of: Record, variant: str) -> report.Row:
    (found,) = [line for line in report.rows(of) if line.variant == variant]
    return found


# --- the bound ---


@pytest.mark.parametrize(("early", "late"), [(16, 16), (15, 15), (20, 8), (3, 2)], ids=str)
def test_bound_counts_once_what_a_request_pays_once(early: int, late: int) -> None:
    # A made-up machine: what is paid once, and a layer, both depend on the number of tokens in their own way.
    def once(tokens: int) -> float:
        return 0.003 + 1e-7 * tokens

    def layer(tokens: int) -> float:
        return 2e-7 * tokens + 1e-12 * tokens**2

    def request(layers: int, tokens: int) -> float:
        return once(tokens) + layers * layer(tokens)

    tokens, kept = 10_000, 2000
    bound = bound_seconds(request(early, tokens), request(late, kept), request(1, kept), late)
    assert bound == pytest.approx(once(tokens) + early * layer(tokens) + late * layer(kept))
    # And a dense request is the sum of its parts.
    depth = Depth(early + late, early - 1)
    parts = parts_seconds(request(early, tokens), request(1, tokens), depth)
    assert parts == pytest.approx(request(early + late, tokens))


def test_one_late_layer_has_no_bound() -> None:
    with pytest.raises(ValueError, match="earlier prune layer"):
        late_seconds(2.0, 1.0, 1)
    with pytest.raises(ValueError, match="later prune layer"):
        parts_seconds(2.0, 1.0, Depth(3, 0))


def test_depth_counts_the_prune_layer_as_early() -> None:
    assert (Depth(32, 15).early, Depth(32, 15).late) == (16, 16)
    assert (Depth(36, 20).early, Depth(36, 20).late) == (21, 15)


# --- bytes ---


def test_bytes_of_a_step_counted_by_hand() -> None:
    model = {
        "hidden_size": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "intermediate_size": 7,
        "num_hidden_layers": 3,
        "vocab_size": 11,
    }
    # q and o: 6 x 20 each; k and v: 6 x 10 each; gate, up, down: 6 x 7 each
    weights = 3 * (2 * 120 + 2 * 60 + 3 * 42) + 11 * 6
    token = 2 * 2 * 5  # key and value, 2 heads of 5
    depth = Depth(3, 0)
    assert step_bytes(model, 2, 4, 100, 10, depth, 1.0) == 2 * (weights + 4 * token * 3 * 110)
    assert step_bytes(model, 2, 4, 100, 10, depth, 0.25) == 2 * (weights + 4 * token * (110 + 2 * 35))


def test_bytes_of_a_step_of_llama_agree_with_what_was_measured() -> None:
    # claa-notes: 64K context, batch 8, 83 GB read per step
    assert step_bytes(LLAMA, 2, 8, 65_536, 0, Depth(32, 15), 1.0) == pytest.approx(83.5e9, rel=0.01)


def test_decoding_reports_its_share_of_the_bandwidth() -> None:
    made = record()
    fill(made, "decode", 65_536, PER_TOKEN, stock=[0.0250, 0.0251], pruned=[0.0150, 0.0151])
    stock, pruned = row(made, STOCK), row(made, PRUNED)
    assert stock.bandwidth_share == pytest.approx(stock.step_bytes / 0.02505 / 4e12)
    assert pruned.step_bytes == pytest.approx(15.0e9 + 0.6 * (stock.step_bytes - 15.0e9), rel=0.01)
    assert row(record_without_bandwidth(made), STOCK).bandwidth_share is None


def record_without_bandwidth(made: Record) -> Record:
    return msgspec.structs.replace(made, bandwidth=None)


# --- claims ---


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
    for target in targets.TARGETS:
        if target.scenario != "startup" and target.tokens not in (
            None,
            65_536,
        ):  # decoding at 64K needs a run of its own
            assert target.tokens in scenarios.SCENARIOS[target.scenario].points(GPU_DEFAULTS)


# --- files ---


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    made = record(engines=[{"name": "stock", "seconds": 1.5}], claa={"startup_seconds": {"server": 0.25}})
    fill(made, "cold", 1024, TTFT, stock=[0.1 + 0.2, 1e-9])
    save(made, tmp_path / "new" / "r.json")
    assert load(tmp_path / "new" / "r.json") == made
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.json"]


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', "[1]"], ids=repr)
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json: not a result"):
        load(path)


def test_an_older_format_is_refused(tmp_path: Path) -> None:
    save(record(version=0), tmp_path / "old.json")
    with pytest.raises(ValueError, match="format 0"):
        load(tmp_path / "old.json")


# --- what is shown ---


def full_record() -> Record:
    made = record(stopped="out of time")
    for tokens in (1024, 4096):
        fill(made, "cold", tokens, TTFT, stock=[1.0, 1.1], pruned=[0.6, 0.7], early=[0.5, 0.5], late=[0.1, 0.1])
        fill(made, "cold", tokens, TTFT, one=[0.01, 0.01])
    for rate in (1.0, 2.0):
        for variant, times in ((STOCK, [0.5, 0.9]), (PRUNED, [0.3, 0.4])):
            series = made.series_of(
                scenario="rates", tokens=4096, chunk=8192, rate=rate, quantity=TTFT, variant=variant
            )
            series.samples += times
    return made


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


# --- engines ---


def model(random: bool = True) -> setup.Model:
    return setup.Model("m", LLAMA, {"load_format": "dummy"} if random else {}, 2, 15)


def options(random: bool = True, settings: Settings = GPU_DEFAULTS, names: Any = ("cold",)) -> dict[str, Any]:
    return setup.engine_options(model(random), settings, 8192, names, gpu=True)


def test_engines_have_room_for_what_they_serve() -> None:
    made = options()
    assert set(made) == {"stock", "claa", "early", "late", "one"}
    tokens = {name: own["max_total_tokens"] for name, own in made.items()}
    assert tokens["stock"] > 131_072 and tokens["claa"] > 1.2 * 131_072 and tokens["early"] > 131_072
    assert 26_214 < tokens["late"] < 40_000 and tokens["one"] == tokens["early"]
    assert set(options(names=("burst",))) == {"stock", "claa"}


def test_equal_halves_are_one_engine() -> None:
    made = options()
    assert run.same_model(made["late"], made["early"])
    assert not run.same_model(made["one"], made["early"])
    assert not run.same_model(None, made["early"])


def test_stock_is_stock() -> None:
    assert not [name for name in options()["stock"] if "claa" in name or "backend" in name or "graph" in name]


def test_random_weights_get_positions_and_a_checkpoint_gets_an_error() -> None:
    override = json.loads(options()["early"]["json_model_override_args"])
    assert override["num_hidden_layers"] == 16 and override["max_position_embeddings"] > 131_072
    with pytest.raises(ValueError, match="131072 positions, too few"):
        options(random=False)
    short = msgspec.structs.replace(GPU_DEFAULTS, lengths=[4096])
    assert "json_model_override_args" not in options(settings=short)["stock"]


def test_every_scenario_says_what_it_takes() -> None:
    for settings in (GPU_DEFAULTS, CPU_DEFAULTS):
        for name, scenario in scenarios.SCENARIOS.items():
            need = setup.demand(settings, name)
            assert need.tokens >= need.longest >= max(scenario.points(settings))
            assert bool(need.bounded) == ("late" in scenario.engines)
    for name in bench_ttft.OTHERS:
        setup.demand(GPU_DEFAULTS, name)


def test_options_become_flags() -> None:
    given = {"model_path": "m", "enable_claa": True, "claa_prune_layer": 15}
    assert rates.flags(given) == ["--model-path", "m", "--enable-claa", "--claa-prune-layer", "15"]


# --- the command ---


def test_every_setting_is_an_option() -> None:
    assert set(HELP) == set(Settings.__struct_fields__)
    args = bench_ttft.parse_args(
        ["--lengths", "10", "20", "--chat", "1", "9", "3", "--mixed-gap", "0.5", "--rounds", "7"]
    )
    settings = bench_ttft.settings_of(args, gpu=False)
    assert (settings.lengths, settings.mixed_gap, settings.rounds) == ([10, 20], 0.5, 7)
    assert (settings.chat.first, settings.chat.last, settings.chat.turns) == (1, 9, 3)
    assert settings.chunks == CPU_DEFAULTS.chunks
    assert bench_ttft.settings_of(args, gpu=True).chunks == GPU_DEFAULTS.chunks


def test_a_budget_ends_before_it_is_exceeded() -> None:
    run.Budget(None).check(1e9)
    budget = run.Budget(100.0)
    budget.check(80.0)
    with pytest.raises(run.OutOfTime, match="100 s were used and the next round would take 90 s"):
        budget.check(90.0)


def test_what_fails_is_on_record_and_the_rest_goes_on(tmp_path: Path) -> None:
    made = record(stopped="")
    how = run.How(gpu=False, one_at_a_time=False, start_in_turn=False, log_level="error")
    running = run.Run(model(), CPU_DEFAULTS, how, run.Budget(None), made, tmp_path / "r.json")

    def once(index: int) -> scenarios.Samples:
        if index == 3:
            raise RuntimeError("this request was to run pruned: [x]")
        return {(TTFT, STOCK): float(index)}

    running.rounds("cold", 1024, 2048, once)
    running.rounds("cold", 2048, 2048, lambda index: {(TTFT, STOCK): 1.0})
    saved = load(tmp_path / "r.json")
    # Round 0 warms up.
    assert [(series.tokens, series.samples) for series in saved.series] == [(1024, [1.0, 2.0]), (2048, [1.0] * 5)]
    assert saved.errors == ["cold, 1024 tokens, chunk 2048, round 3: this request was to run pruned: [x]"]
    out = io.StringIO()
    report.print_record(saved, Console(file=out, width=160))
    assert "failed: cold, 1024" in out.getvalue() and "[x]" in out.getvalue()


def test_earlier_results_are_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(full_record(), tmp_path / "a.json")
    assert bench_ttft.main(["--plot", str(tmp_path / "a.json")]) == 0
    assert "keep 0.2" in capsys.readouterr().out
    assert (tmp_path / "a.png").exists()
