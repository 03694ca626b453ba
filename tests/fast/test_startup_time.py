"""The time that the plugin adds to a start."""

from __future__ import annotations

import time

import pytest

from claa_sglang import startup_time


def test_nested_times_are_counted_once() -> None:
    before = startup_time.seconds()
    with startup_time.counted():
        with startup_time.counted():
            time.sleep(0.05)
        time.sleep(0.05)
    assert 0.09 < startup_time.seconds() - before < 0.19


def test_what_fails_is_counted_too() -> None:
    before = startup_time.seconds()
    with pytest.raises(ZeroDivisionError), startup_time.counted():
        time.sleep(0.02)
        _ = 1 / 0
    # Both are rounded to a millisecond.
    assert startup_time.seconds() - before > 0.015
