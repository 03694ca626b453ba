"""docs/faq.md has a heading for every text by which a user meets CLAA: refusals, and reasons to run dense."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from claa_sglang.config import refusals
from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.policy import policy
from claa_sglang.policy.cost import Constants, CostModel
from claa_sglang.requests import dense_rules

FAQ = Path(__file__).resolve().parents[3] / "docs" / "faq.md"
HEADINGS = [line.lstrip("# ").strip() for line in FAQ.read_text().splitlines() if line.startswith("### ")]
STEP = PruneStep(prune_layer=15, keep_rate=0.2, score_layers=(15,))
H200 = Constants(per_pass=5e-4, per_row=7.2e-7, per_pair=2.7e-11, per_prune=1e-3)  # and 8B, as in test_policy.py


def reasons_of_the_policy() -> set[str]:
    """The reasons that a policy gives, up to the colon, over prompts and hits that bring out each of them."""
    chooser = policy.Policy(ClaaConfig(steps=(STEP,), num_layers=32), CostModel(H200), chunk=8192)
    found = set()
    for tokens in (64, 1000, 4000, 16000, 64000):
        for dense, pruned in ((0, 0), (0, tokens // 2), (0, tokens - 60), (tokens - 20, 0)):
            for samples in (1, 64):
                prompt = policy.Prompt(tokens, (STEP,), policy.Hits(dense, pruned), samples=samples)
                found.add(chooser.choose(prompt).reason.partition(":")[0])
    return found


@pytest.mark.parametrize("rule", refusals.RULES, ids=lambda rule: rule.id)
def test_every_refusal_has_a_heading(rule: refusals.Rule) -> None:
    assert rule.id in HEADINGS, f"docs/faq.md needs '### {rule.id}': what it means and what to do"


@pytest.mark.parametrize("rule", dense_rules.RULES, ids=lambda rule: rule.reason)
def test_every_reason_to_run_dense_has_a_heading(rule: dense_rules.DenseRule) -> None:
    heading = re.sub(r"{\w+}", "…", rule.reason)
    assert heading in HEADINGS, f"docs/faq.md needs '### {heading}'"


def test_every_reason_of_the_policy_has_a_heading() -> None:
    found = reasons_of_the_policy()
    assert len(found) == 4, "this test no longer brings out every reason"
    assert found <= set(HEADINGS)


def test_no_heading_is_there_twice() -> None:
    assert [heading for heading, count in Counter(HEADINGS).items() if count > 1] == []
