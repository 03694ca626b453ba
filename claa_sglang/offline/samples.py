"""Prompts as token ids, with the tokens that must not be lost where the prompt names them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from claa_sglang.tasks.encode import token_ids
from claa_sglang.tasks.grade import grade
from claa_sglang.tasks.record import Prompt


class Needle(NamedTuple):
    """What the answer needs of a needle: an expected answer and its tokens in the needle, bool [N].

    The sentence around an answer need not be kept for it to be found. The answer is empty, and the tokens are the whole
    needle's, where the prompt expects no answers. place: which of the prompt's needles it is in.
    """

    answer: str
    tokens: Tensor
    place: int = 0


class Sample(NamedTuple):
    """A prompt of N tokens. input_ids: int64 [N]. needles: empty where the prompt names none or none can be found."""

    prompt: Prompt
    input_ids: Tensor
    needles: tuple[Needle, ...]

    def used(self, answer: str) -> Tensor:
        """bool [N]: tokens of the needles whose expected answer the model itself gave in `answer`.

        What dense does not find, a prune cannot lose.
        """
        total = torch.zeros(self.input_ids.numel(), dtype=torch.bool)
        for needle in self._given(answer):
            total |= needle.tokens
        return total

    def longest(self, answer: str) -> int:
        """The most of these tokens that are in one needle."""
        given = self._given(answer)
        parts = [[one.tokens for one in given if one.place == place] for place in {one.place for one in given}]
        return max((int(torch.stack(part).any(dim=0).sum()) for part in parts), default=0)

    def _given(self, answer: str) -> list[Needle]:
        return [one for one in self.needles if not one.answer or grade(answer, [one.answer], self.prompt.exact)]


def sample(prompt: Prompt, tokenizer: Any) -> Sample:
    """Encode a prompt and find its needles. tokenizer: a fast Hugging Face one; only these know where a token lies."""
    ids = token_ids(prompt, tokenizer)
    return Sample(prompt, torch.tensor(ids, dtype=torch.int64), _needles(prompt, ids, tokenizer))


def _needles(prompt: Prompt, ids: list[int], tokenizer: Any) -> tuple[Needle, ...]:
    if not prompt.needles:
        return ()
    # A prompt may be ids without a text, so every one is read back; where that gives other ids, nothing can be located.
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if again.input_ids != ids:
        return ()
    found = []
    for number, sentence in enumerate(prompt.needles):
        start = text.find(sentence)
        if start < 0:
            return ()
        for answer in prompt.answers or [""]:
            place = sentence.casefold().find(answer.casefold())
            if place >= 0:  # a needle without an expected answer is there to distract
                length = len(answer) or len(sentence)
                tokens = _between(again.offset_mapping, start + place, start + place + length)
                found.append(Needle(answer, tokens, number))
    return tuple(found)


def _between(offsets: list[tuple[int, int]], start: int, end: int) -> Tensor:
    """bool [N]: tokens that share a character with [start, end) of the text."""
    return torch.tensor([first < end and last > start for first, last in offsets])
