"""Task generators: lengths, answers and needles of every task, and that they depend on their seed alone."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from claa_sglang import cli
from claa_sglang.offline.samples import sample
from claa_sglang.tasks import passages, sources, words
from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.filler import Filler, Placed, place
from claa_sglang.tasks.fit import FitError, fit
from claa_sglang.tasks.generate import TASKS, WITHOUT_FILLER, TaskError, generate, total
from claa_sglang.tasks.grade import grade
from claa_sglang.tasks.record import Prompt, load

NEEDLES = [task for task in TASKS if task != "common-words"]
COPIES = [task for task in TASKS if task.startswith("copy-")]


@pytest.fixture(scope="module")
def tokenizer(small_model_path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_model_path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[Prompt]:
    """Two of each task, length and source."""
    return list(generate(tokenizer, list(TASKS), [1024, 2000], list(sources.SOURCES), count=2, seed=5))


def text(prompt: Prompt) -> str:
    assert prompt.messages is not None
    return prompt.messages[0].content


def test_every_task_length_and_source_is_there_and_no_prompt_twice(prompts: list[Prompt]) -> None:
    assert len(prompts) == total(list(TASKS), [1024, 2000], list(sources.SOURCES), count=2) == 2 * 2 * (3 * 11 + 1)
    assert len({prompt.key for prompt in prompts}) == len(prompts)
    made = {(prompt.task, prompt.source, prompt.length, prompt.seed) for prompt in prompts}
    assert len(made) == len(prompts)
    assert {source for task, source, *_ in made if task == "common-words"} == {WITHOUT_FILLER["common-words"]}


def test_lengths_are_those_asked_for(prompts: list[Prompt], tokenizer: Any) -> None:
    for prompt in prompts:
        assert 0.97 * prompt.length <= len(token_ids(prompt, tokenizer)) <= prompt.length, prompt


def test_each_needle_is_there_once_and_holds_an_answer(prompts: list[Prompt]) -> None:
    checked = 0
    for prompt in prompts:
        for needle in prompt.needles:
            assert text(prompt).count(needle) == 1, (prompt.task, needle)
        if prompt.needles:
            checked += 1
            assert all(any(answer in needle for needle in prompt.needles) for answer in prompt.answers)
    assert checked == 2 * 2 * 3 * len(NEEDLES)


@pytest.mark.parametrize("task", NEEDLES)
def test_only_the_needles_answer(prompts: list[Prompt], task: str) -> None:
    """Without its needles a prompt does not contain its answers, so no right answer is a guess from the filler."""
    for prompt in (one for one in prompts if one.task == task):
        rest = text(prompt)
        for needle in prompt.needles:
            rest = rest.replace(needle, "")
        assert grade(rest, prompt.answers, prompt.exact) == 0, prompt


def test_every_answer_s_tokens_are_found(prompts: list[Prompt], tokenizer: Any) -> None:
    """In every prompt with needles, each answer has its own tokens, and they say the answer and hardly more."""
    for prompt in (one for one in prompts if one.needles):
        found = sample(prompt, tokenizer)
        assert {needle.answer for needle in found.needles} == set(prompt.answers), prompt.task
        for needle in found.needles:
            said = tokenizer.decode(found.input_ids[needle.tokens])
            assert needle.answer in said and len(said) <= len(needle.answer) + 2, (prompt.task, said)


@pytest.mark.parametrize("task", COPIES)
def test_a_copy_goes_on_with_the_tokens_of_the_text(prompts: list[Prompt], tokenizer: Any, task: str) -> None:
    """The prefix does not join with what follows, and what follows is in the prompt token by token: all that a model
    has to do is to copy. There is room for all of it."""
    for prompt in (one for one in prompts if one.task == task):
        (needle,) = prompt.needles
        already = {"copy-code": needle.find(" ", 4), "copy-quote": 0, "copy-links": 1}[task]
        assert prompt.answer_prefix.endswith(needle[:already])
        ids, content = token_ids(prompt, tokenizer), text(prompt)
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        said = template + prompt.answer_prefix + needle[already:]
        whole = tokenizer(said, add_special_tokens=False).input_ids
        assert whole[: len(ids)] == ids
        copied = whole[len(ids) :]
        assert str(copied[:-1])[1:-1] in str(ids), "the last token may join with what follows in the text"
        assert prompt.exact and grade(tokenizer.decode(copied), prompt.answers, exact=True) == 1
        assert prompt.max_new_tokens is not None and prompt.max_new_tokens > 1.2 * len(copied)


def test_followups_are_other_questions_about_the_text(prompts: list[Prompt], tokenizer: Any) -> None:
    """Each has answers of its own, in a sentence that is there once; and the first question's are not among them."""
    more = {prompt.task: len(prompt.followups) for prompt in prompts}
    assert {task: n for task, n in more.items() if n} == {"multi-key": 3, **dict.fromkeys(COPIES, 3)}
    for prompt in (one for one in prompts if one.followups):
        asked = [prompt.answers, *(one.answers for one in prompt.followups)]
        assert len({answer for answers in asked for answer in answers}) == sum(map(len, asked))
        for one in prompt.followups:
            assert all(text(prompt).count(needle) == 1 for needle in one.needles)
            assert grade("\n".join(one.needles), one.answers, prompt.exact) == 1
            assert one.answer_prefix and one.question not in text(prompt)
    (chat,) = generate(tokenizer, ["copy-links"], [1024], ["prose"], 1, prefix=False)
    assert len(chat.followups) == 3 and not any(one.answer_prefix for one in chat.followups)


def test_a_prompt_may_end_as_a_chat_does(tokenizer: Any) -> None:
    """The same questions, the template's generation prompt at the end, and room for an introduction."""
    asked = (tokenizer, list(TASKS), [2000], ["repeated"], 1)
    for said, unsaid in zip(generate(*asked), generate(*asked, prefix=False), strict=True):
        assert said.answer_prefix and not unsaid.answer_prefix and unsaid.answers == said.answers
        assert text(unsaid).splitlines()[-1] == text(said).splitlines()[-1]
        assert tokenizer.decode(token_ids(unsaid, tokenizer)).endswith("<|im_start|>assistant\n")
        assert said.max_new_tokens is not None and unsaid.max_new_tokens is not None
        spent = len(tokenizer(said.answer_prefix).input_ids)
        assert unsaid.max_new_tokens >= said.max_new_tokens + spent + 32


def test_common_words_are_the_most_common(prompts: list[Prompt]) -> None:
    for prompt in (one for one in prompts if one.task == "common-words"):
        listed = text(prompt).split("Memorize")[-1].split()
        counts = {word: listed.count(word) for word in set(listed)}
        assert len(prompt.answers) == 10
        least = min(counts[word] for word in prompt.answers)
        others = max(n for word, n in counts.items() if word.isalpha() and word not in prompt.answers)
        assert least >= 2 * others


def test_a_prompt_depends_on_its_seed_alone(prompts: list[Prompt], tokenizer: Any) -> None:
    """Not on the process, on the other prompts, or on how often it was made."""
    (again,) = generate(tokenizer, ["multi-key"], [2000], ["prose"], count=1, seed=6)
    assert again == next(p for p in prompts if (p.task, p.length, p.source, p.seed) == ("multi-key", 2000, "prose", 6))
    assert again.key == "bf98f5acf39143c2"
    (other,) = generate(tokenizer, ["multi-key"], [2000], ["prose"], count=1, seed=7)
    assert not set(other.answers) & set(again.answers) and text(other)[:300] != text(again)[:300]


def test_depths_are_spread(tokenizer: Any) -> None:
    depths = []
    for prompt in generate(tokenizer, ["needle-number"], [512], ["repeated"], count=40):
        before, after = text(prompt).split(prompt.needles[0])
        depths.append(len(before) / (len(before) + len(after)))
    assert min(depths) < 0.2 and max(depths) > 0.8 and 0.35 < sum(depths) / len(depths) < 0.65


@pytest.mark.parametrize("kind", words.KINDS)
def test_values(kind: str) -> None:
    values = words.values(random.Random(1), 50, kind)
    assert len(set(values)) == 50
    assert all({"number": 7, "uuid": 36}.get(kind, len(value)) == len(value) for value in values)


def test_only_one_passage_answers() -> None:
    rng = random.Random(0)
    asked = next(passages._facts(rng))
    others = list(islice(passages._facts(rng, avoid=asked), 3000))
    assert len({fact.town for fact in others} | {asked.town}) == 3001
    assert asked.answer not in {fact.answer for fact in others}


def test_text_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text('One is here. "Two is there." Three!\n\nFour\nis e.g. here. Five?\n')
    drawn = sources.sentences(str(path), random.Random(0))
    first = [next(drawn) for _ in range(5)]
    assert sorted(first) == ['"Two is there."', "Five?", "Four is e.g. here.", "One is here.", "Three!"]
    assert {next(drawn) for _ in range(5)} == set(first), "the text begins again"


def test_a_longer_text_begins_like_a_shorter_one() -> None:
    filler = Filler(iter(["a b c.", "d e.", "f."]))
    assert filler.take(4) == ["a b c.", "d"]
    assert filler.take(6) == ["a b c.", "d e.", "f."]
    assert filler.take(0) == []


def test_placed_sentences_are_at_their_depths() -> None:
    assert place(["a.", "b."], [Placed(0.0, "0."), Placed(1.0, "1."), Placed(0.5, "h.")]) == "0. a. h. b. 1."
    assert place([], [Placed(0.3, "x."), Placed(0.1, "w.")]) == "w. x."


@pytest.mark.parametrize("per_word", [0.3, 1.0, 1.4, 3.7])
@pytest.mark.parametrize("length", [300, 1024, 131072])
def test_fit_needs_few_counts(per_word: float, length: int) -> None:
    counted = []

    def count(size: int) -> int:
        counted.append(size)
        return 100 + round(per_word * size)

    assert 0.97 * length <= 100 + round(per_word * fit(count, length)) <= length
    assert len(counted) <= 7


def test_what_cannot_be_made_is_refused(tokenizer: Any) -> None:
    with pytest.raises(TaskError, match="no task 'needle': use needle-number, .*"):
        generate(tokenizer, ["needle"], [1024], ["prose"], 1)
    with pytest.raises(TaskError, match="no source of text 'poems': use prose, repeated, sentences or the name of"):
        generate(tokenizer, ["needle-uuid"], [1024], ["poems"], 1)
    with pytest.raises(TaskError, match=r"50 tokens are too few: without any filler the prompt has \d+"):
        list(generate(tokenizer, ["needle-uuid"], [50], ["prose"], 1))
    with pytest.raises(FitError, match="no text of 1000 tokens: 900 with 9 words, 1100 with 10"):
        fit(lambda size: 900 + 200 * (size > 9), 1000)


def test_the_command_writes_a_file(tmp_path: Path, small_model_path: Path, tokenizer: Any, capsys: Any) -> None:
    asked = ["--tasks", "multi-query", "--lengths", "512", "--sources", "repeated", "--count", "2", "--seed", "3"]
    for name, more in (("text.jsonl", []), ("ids.jsonl.xz", ["--token-ids"])):
        command = ["tasks", "--model", str(small_model_path), *asked, *more, "--out", str(tmp_path / name)]
        assert cli.main(command) == 0
    text_form, ids_form = load(tmp_path / "text.jsonl"), load(tmp_path / "ids.jsonl.xz")
    assert text_form == list(generate(tokenizer, ["multi-query"], [512], ["repeated"], 2, 3))
    assert [one.input_ids for one in ids_form] == [token_ids(one, tokenizer) for one in text_form]
    assert [one.answers for one in ids_form] == [one.answers for one in text_form]
    assert cli.main([*command[:-1], str(tmp_path / "chat.jsonl"), "--no-prefix"]) == 0
    assert [one.answers for one in load(tmp_path / "chat.jsonl")] == [one.answers for one in text_form]
    assert not any(one.answer_prefix for one in load(tmp_path / "chat.jsonl"))
    assert cli.main([*command[:-1], str(tmp_path / "none.jsonl"), "--tasks", "poems"]) == 1
    assert "claa-sglang tasks: no task 'poems': use needle-number" in capsys.readouterr().err
    assert not (tmp_path / "none.jsonl").exists()
