"""The time that the plugin adds to a start."""

from __future__ import annotations

import time

import pytest

from claa_sglang.start import startup_time


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup_time, "_parts", {})
    monkeypatch.setattr(startup_time, "_inner", [])


def test_a_part_inside_another_is_counted_once() -> None:
    start = time.perf_counter()
    with startup_time.counted("outer"):
        with startup_time.counted("inner"):
            time.sleep(0.05)
        time.sleep(0.02)
    took = time.perf_counter() - start
    found = startup_time.parts()
    assert found["inner"] >= 0.049 and found["outer"] >= 0.019  # both are rounded to a millisecond
    assert startup_time.seconds() <= took + 0.001


def test_the_same_part_adds_up() -> None:
    for _ in range(2):
        with startup_time.counted("part"):
            time.sleep(0.02)
    assert startup_time.parts()["part"] >= 0.039


def test_what_fails_is_counted_too() -> None:
    with pytest.raises(ZeroDivisionError), startup_time.counted("part"):
        time.sleep(0.02)
        _ = 1 / 0
    assert startup_time.seconds() >= 0.019
    with startup_time.counted("another"):
        pass
    assert startup_time.parts()["another"] <= 0.01
