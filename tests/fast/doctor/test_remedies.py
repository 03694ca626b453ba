"""Flags with which a server would start are found by trying, and changed as little as that needs."""

from __future__ import annotations

import pytest

from claa_sglang.doctor.finding import Finding, found, is_ready
from claa_sglang.doctor.remedies import Words, startable

MODEL = ("--model-path", "m", "--tp-size", "2")


def problems(words: Words) -> list[str]:
    """As the rules word theirs."""
    value = dict(zip(words, words[1:], strict=False))
    against = []
    if "--enable-lora" in words:
        against.append("[lora] why. Remedy: start without --enable-lora and --lora-paths.")
    if value.get("--page-size", "1") != "1" and value.get("--attention-backend") not in ("fa3", "triton"):
        against.append("[page-size] why. Remedy: use --page-size 1, or --attention-backend {fa3,triton}.")
    if value.get("--chunk", "64") == "8":
        against.append("[chunk] it is short. Remedy: something else.")
    if "--backend" not in words:
        against.append("[default] what stock takes. Remedy: use --backend known.")
    if "--unreadable" in words:
        raise ValueError("no such thing")
    return against


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ((), ()),
        (("--enable-lora", "--lora-paths", "a", "b"), ("--lora-paths", "a", "b")),
        (("--page-size", "64"), ()),
        (("--page-size=64", "--enable-lora"), ("--page-size=64",)),
        (("--page-size", "64", "--attention-backend", "fa3"), ("--page-size", "64", "--attention-backend", "fa3")),
        (("--chunk", "8"), ()),  # its remedy names no flag: any may be left out
    ],
)
def test_nothing_but_what_is_in_the_way_goes(given: Words, left: Words) -> None:
    assert startable((*MODEL, "--backend", "known", *given), problems) == (*MODEL, "--backend", "known", *left)


def test_a_flag_that_a_remedy_names_is_added() -> None:
    assert startable(MODEL, problems) == (*MODEL, "--backend", "known")


def test_nothing_is_promised_that_was_not_found() -> None:
    assert startable(MODEL, lambda words: ["[model] why. Remedy: serve this model without --enable-claa."]) is None
    with pytest.raises(ValueError, match="no such thing"):
        startable((*MODEL, "--unreadable"), problems)


def test_a_probe_that_fails_is_a_line() -> None:
    def broken() -> Finding:
        raise OSError("the disk\nis gone")

    finding = found("device", broken)
    assert finding.lines == ["NO  device: could not be checked: OSError: the disk is gone"]
    assert not is_ready([finding]) and is_ready([Finding("device", None, "none"), Finding("hooks", True, "fit")])
    assert Finding("hooks", False, "one does not fit", ("a\nb",)).lines[1:] == ["      a", "      b"]
