"""How often the beginning of a prompt was used."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from claa_sglang.policy.prefix_uses import BLOCK, PrefixUses

prompts = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=8)


@given(prompts)
def test_counts_are_those_of_prompts_with_the_same_blocks(shapes: list[tuple[int, int]]) -> None:
    uses, seen = PrefixUses(), []
    for first, blocks in shapes:
        prompt = [first] * BLOCK * blocks + [9] * 7
        for shared in (0, BLOCK * blocks):
            ends = range(BLOCK, shared + 1, BLOCK)
            before = [sum(p[:end] == prompt[:end] for p in seen) for end in ends]
            assert uses.note(prompt, "", shared) == (sum(before) / len(before) if before else 0)
            seen.append(prompt)


def test_blocks_are_known_by_all_that_is_before_them() -> None:
    uses = PrefixUses()
    uses.note([1] * BLOCK + [2] * BLOCK, "", 0)
    assert uses.note([3] * BLOCK + [2] * BLOCK, "", 2 * BLOCK) == 0


def test_a_client_s_key_is_its_own() -> None:
    uses, prompt = PrefixUses(), [1] * BLOCK
    uses.note(prompt, "a", 0)
    assert (uses.note(prompt, "b", BLOCK), uses.note(prompt, "a", BLOCK)) == (0, 1)


def test_the_least_recently_used_are_forgotten_first() -> None:
    uses = PrefixUses(capacity=2)
    for first in (1, 2, 1, 3):
        uses.note([first] * BLOCK, "", 0)
    assert uses.note([1] * BLOCK, "", BLOCK) == 2
    assert uses.note([2] * BLOCK, "", BLOCK) == 0
