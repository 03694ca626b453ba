"""What the demo says of its times, and that it is never silent: neither in a pipe nor in a terminal."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "demo"))  # as `python examples/demo` has it

import verdict  # noqa: E402
from progress import Progress  # noqa: E402
from verdict import Times  # noqa: E402


@pytest.mark.parametrize(
    ("cold", "follow_up", "says"),
    [
        (Times(2000, 1500), Times(100, 700), "Pruning saved 500 ms (25%) on the cold prompt and cost 600 ms on the "
         "follow-up: it pays where a text is asked about once."),
        (Times(2000, 1500), Times(100, 400), "cost 300 ms on the follow-up: it pays while a text has at most "
         "1 follow-up."),
        (Times(3000, 1500), Times(100, 400), "it pays while a text has at most 5 follow-ups."),
        (Times(2000, 1500), Times(100, 90), "saved 500 ms (25%) on the cold prompt and 10 ms on the follow-up."),
        (Times(2000, 2100), Times(100, 700), "Pruning did not pay in this run: 100 ms lost on the cold prompt and "
         "600 ms lost on the follow-up."),
        (Times(2000, 1990), Times(100, 700), "did not pay in this run: 10 ms saved on the cold prompt and 600 ms lost"),
        (Times(2000, 2100), Times(100, 90), "100 ms lost on the cold prompt and 10 ms saved on the follow-up."),
    ],
)  # fmt: skip
def test_one_sentence_weighs_gain_and_cost(cold: Times, follow_up: Times, says: str) -> None:
    assert says in verdict.sentence(cold, follow_up)


def test_gain_and_cost_have_the_measured_numbers() -> None:
    gain = verdict.gain(Times(2000, 1500), 1477, 443, 21)
    assert "443 of 1,477 tokens" in gain and "past layer 21" in gain
    assert "1,500 ms pruned, 2,000 ms dense (0.75 of dense)" in gain
    cost = verdict.cost(Times(100, 700), 1458, 1472)
    assert "1,458 of 1,472 tokens were cached" in cost and "700 ms pruned, 100 ms dense (7.00 of dense)" in cost


def test_a_long_step_shows_signs_of_life_in_a_pipe() -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out), heartbeat=0.02)
    with progress.step("starting [x]"):
        time.sleep(0.2)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[   0 s] starting [x]" and lines.count("[   0 s] ... starting [x]") >= 2
    before = len(out.getvalue())
    time.sleep(0.06)
    assert len(out.getvalue()) == before, "it goes on after the step"


def test_a_terminal_has_the_lines_and_a_spinner() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=100)).step("starting"):
        time.sleep(0.3)
    assert out.getvalue().count("starting") >= 2 and "..." not in out.getvalue()
