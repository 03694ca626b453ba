"""The queue of shadow requests, held against a plain list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.shadow.waiting import Shadow, Waiting

MOST, TOKENS = 3, 20
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "put back"]), st.integers(1, TOKENS + 4)),
        st.tuples(st.sampled_from(["take", "clear"]), st.just(0)),
    )
)


def shadow(tokens: int, answer: int = 0, weights: int = 0) -> Shadow:
    return Shadow([1] * (tokens - answer), False, {}, (None, None), weights, [2] * answer)


@given(ACTIONS)
def test_it_is_a_bounded_list_whose_newest_win(actions: list[tuple[str, int]]) -> None:
    waiting, plain = Waiting(MOST, TOKENS), []
    for action, tokens in actions:
        new = shadow(tokens, answer=tokens // 3) if tokens else None
        if action == "add":
            gone = waiting.add(new)
            if tokens > TOKENS:
                assert gone == [new]
            else:
                # As few of the oldest as have to go.
                rest = next(
                    plain[start:]
                    for start in range(len(plain) + 1)
                    if len(plain) - start < MOST and sum(s.tokens for s in plain[start:]) + tokens <= TOKENS
                )
                assert gone == plain[: len(plain) - len(rest)]
                plain = [*rest, new]
        elif action == "put back":
            fits = len(plain) < MOST and sum(s.tokens for s in plain) + tokens <= TOKENS
            assert waiting.put_back(new) == fits
            plain = [new, *plain] if fits else plain
        elif action == "clear":
            assert waiting.clear() == plain
            plain = []
        elif plain:
            assert waiting.take() is plain.pop(0)
        else:
            with pytest.raises(IndexError):
                waiting.take()
        assert len(waiting) == len(plain) <= MOST and waiting.tokens == sum(s.tokens for s in plain) <= TOKENS
