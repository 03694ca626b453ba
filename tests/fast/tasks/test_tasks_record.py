"""Files of prompts: what is written is read, what is no prompt is refused with line and field; and grading."""

from __future__ import annotations

from pathlib import Path

import pytest

from claa_sglang.tasks.grade import grade
from claa_sglang.tasks.record import Message, Prompt, PromptError, load, save

PROMPTS = [
    Prompt(
        task="a", source="b", length=9, seed=1, messages=[Message("user", "Ünï")], answers=["x"], answer_prefix="y:"
    ),
    Prompt(prompt="The capital of France is", answers=["Paris"]),
    Prompt(input_ids=[1, 2, 3], answers=["Aa"], exact=True, max_new_tokens=4),
]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.jsonl.xz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    assert save(iter(PROMPTS), tmp_path / name) == 3
    assert load(tmp_path / name) == PROMPTS
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    def broken():
        yield PROMPTS[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        save(broken(), tmp_path / "p.jsonl")
    assert not (tmp_path / "p.jsonl").exists()


def test_keys_name_what_is_sent() -> None:
    assert len({prompt.key for prompt in PROMPTS}) == 3
    same = Prompt(prompt="The capital of France is", answers=["Lyon"], task="other", needles=["n"], max_new_tokens=9)
    assert same.key == PROMPTS[1].key
    assert Prompt(prompt="The capital of France is", answer_prefix=" in").key != PROMPTS[1].key


BAD = {
    '{"prompt": "x", "anwsers": ["y"]}': "unknown field `anwsers`",
    '{"prompt": "x", "answers": "y"}': r"Expected `array`, got `str` - at `\$.answers`",
    '{"messages": [{"role": "user"}]}': r"missing required field `content` - at `\$.messages\[0\]`",
    '{"input_ids": [1, "2"]}': r"Expected `int`, got `str` - at `\$.input_ids\[1\]`",
    '{"answers": ["y"]}': "exactly one of messages, prompt and input_ids .* got none of them",
    '{"prompt": ""}': "exactly one of messages, prompt and input_ids .* got none of them",
    '{"prompt": "x", "input_ids": [1]}': "got prompt and input_ids",
    "[1]": "Expected `object`, got `array`",
    '{"prompt": "x"': "Input data was truncated",
    '{"prompt": "\xff"}': "UTF-8|utf-8",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(PromptError, match=rf"p\.jsonl, line 3: .*({BAD[line]}).*Fields: task, source"):
        load(path)


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(PromptError, match="no prompts. Write one JSON object a line"):
        load(tmp_path / "p.jsonl")


def test_grades_are_shares_of_what_was_expected() -> None:
    assert grade("It is 1234567.", ["1234567"]) == 1
    assert grade("It is 1234568.", ["1234567"]) == 0
    assert grade("wild-HARBOR, 7", ["Wild-Harbor", "7", "8", "9"]) == 0.5
    assert grade("", ["7"]) == 0
    with pytest.raises(ValueError, match="no answers"):
        grade("x", [])


def test_copies_are_graded_to_the_letter() -> None:
    code = ["a = b * 12", "return a % b"]
    assert grade("    a = b * 12\n    return a % b\n```", code, exact=True) == 1
    assert grade("a = b * 123\nreturn a % B", code, exact=True) == 0
    assert grade("a = b * 123\nreturn a % B", code) == 1
    assert grade("area = b * 12\n  return a % b", code, exact=True) == 0.5
    assert grade('"The a will b the c." He left.', ["The a will b the c."], exact=True) == 1
    assert (
        grade("- https://a.org/b/0f\n- https://a.org/b/0F", ["https://a.org/b/0f", "https://a.org/b/0e"], True) == 0.5
    )


def test_a_file_without_the_field_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "answers": ["Y"]}\n')
    (old,) = load(tmp_path / "p.jsonl")
    assert not old.exact and grade("y", old.answers, old.exact) == 1
