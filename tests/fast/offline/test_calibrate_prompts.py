"""The prompts of a calibration: lengths, forms, room for answers, and what is said where they do not suffice."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import pytest

from claa_sglang.offline.calibrate import command
from claa_sglang.offline.calibrate.prompts import lengths_for, prompts, require_enough, warning
from claa_sglang.offline.calibrate.ranker_list import read
from claa_sglang.offline.calibrate.studied import Shape, answer_tokens, group
from claa_sglang.offline.calibrate.target import LONG_TASKS, CalibrationError, Target
from claa_sglang.offline.samples import sample
from claa_sglang.tasks.generate import TASKS
from claa_sglang.tasks.record import Prompt
from tests.fast import studies

SHAPE = Shape(0.2, read(["claa"]))


@pytest.fixture(scope="module")
def tokenizer(small_model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model_path)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["--model", "m", "--out", "p.json", *flags])


def test_lengths_are_two_as_far_as_the_model_takes_them() -> None:
    assert (lengths_for(None, 32000), lengths_for(None, 2000), lengths_for(None, 900)) == (
        [1024, 4096],
        [1024, 2000],
        [900],
    )
    assert lengths_for([2048, 1024, 2048], 8192) == [1024, 2048]
    with pytest.raises(CalibrationError, match="--lengths 9000: this model takes at most 8192"):
        lengths_for([1024, 9000], 8192)


def test_half_of_the_prompts_end_as_a_chat_does(tokenizer: Any) -> None:
    flags = ["--tasks", "needle-number", "copy-links", "--lengths", "700", "1024", "--held-out-sources", "repeated"]
    chosen_on, held_out = prompts(arguments(*flags, "--count", "3", "--sources", "sentences"), tokenizer, 8192)
    assert len(chosen_on) == len(held_out) == 2 * 2 * 3
    for task in ("needle-number", "copy-links"):
        for length in (700, 1024):
            forms = [(p.seed, bool(p.answer_prefix)) for p in chosen_on if (p.task, p.length) == (task, length)]
            assert sorted(forms) == [(0, True), (1, False), (2, False)]
    only = prompts(arguments(*flags, "--count", "1", "--sources", "sentences", "--form", "prefix"), tokenizer, 8192)
    assert all(p.answer_prefix for part in only for p in part)


def test_by_default_prompts_have_answers_that_are_copied_at_length() -> None:
    assert set(LONG_TASKS) <= set(command.TASKS) <= set(TASKS)


def test_every_long_task_has_a_long_answer(tokenizer: Any) -> None:
    found, _ = prompts(
        arguments("--tasks", *LONG_TASKS, "--lengths", "1024", "--sources", "sentences", "--count", "1"),
        tokenizer,
        8192,
    )
    for prompt in found:
        assert sample(prompt, tokenizer).longest(" ".join(prompt.answers)) >= 24, prompt.task
        assert answer_tokens(prompt) == prompt.max_new_tokens > 24
    short, _ = prompts(
        arguments("--tasks", "multi-value", "--lengths", "1024", "--sources", "sentences", "--count", "1"),
        tokenizer,
        8192,
    )
    for prompt in short:  # four needles: it is one of them that counts, and one that the model gave
        one = sample(prompt, tokenizer)
        assert 0 < one.longest(" ".join(prompt.answers)) < 24 < int(one.used(" ".join(prompt.answers)).sum())
        assert one.longest("I do not know.") == 0


def test_an_answer_has_the_room_its_prompt_gives() -> None:
    assert answer_tokens(Prompt(prompt="a")) == 32
    assert answer_tokens(Prompt(prompt="a", max_new_tokens=200)) == 200
    assert answer_tokens(Prompt(prompt="a", max_new_tokens=4000)) == 256


def test_prompts_without_a_long_answer_are_warned_of() -> None:
    short = group(studies.prompts({6: 1.0}, 3), studies.NoTokenizer(), SHAPE)
    assert short.longest == (studies.NEEDLE,) * 3
    assert warning([short]).endswith("Tasks that have one: needle-uuid, copy-code, copy-quote, copy-links")
    assert warning([short, short._replace(longest=(24,))]) == ""


def test_too_few_known_answers_are_refused_before_the_search() -> None:
    sets = [group(studies.prompts({6: 1.0}, count), studies.NoTokenizer(), SHAPE) for count in (59, 89, 90)]
    require_enough(sets[0], [sets[2]], Target())
    with pytest.raises(CalibrationError, match="expected answer to 89 of 89 held-out prompts; .*0.95 .* takes 90"):
        require_enough(sets[0], [sets[1]], Target())
    require_enough(sets[0], [sets[1]], Target(whole=0.9))
    unknown = [(one._replace(needles=()), study) for one, study in studies.prompts({6: 1.0}, 8)]
    nothing = group(unknown, studies.NoTokenizer(), SHAPE)
    require_enough(nothing, [nothing], Target())  # mass alone is asked for then


def test_lengths_are_those_prompts_were_made_for() -> None:
    pairs = studies.prompts({6: 1.0}, 4)
    pairs[1] = (pairs[1][0]._replace(prompt=msgspec.structs.replace(pairs[1][0].prompt, length=4096)), pairs[1][1])
    assert group(pairs, studies.NoTokenizer(), SHAPE).evidence.lengths == (0, 4096, 0, 0)
