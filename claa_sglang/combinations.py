"""What can be combined with pruning, as a document made from the rules themselves.

`python -m claa_sglang.combinations > docs/combinations.md`; a test compares the two, and looks for every test named.
"""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.config import refusals
from claa_sglang.requests import dense_rules, options


class Works(NamedTuple):
    """Something users combine with a pruned request, and the engine test that shows it works."""

    feature: str
    test: str
    note: str = ""


_COMBINED, _API = "test_combinations.py", "test_api.py"
WORKS: tuple[Works, ...] = (
    Works("streaming", f"{_COMBINED}::test_streaming", "the report is in the last chunk"),
    Works("`n` above 1", f"{_COMBINED}::test_n_samples", "the samples share the prefix and keep the same tokens"),
    Works("several prompts in one request", f"{_COMBINED}::test_batch_requests_and_rids", "each with its own `claa`"),
    Works("stop strings and stop tokens", f"{_COMBINED}::test_stop_strings"),
    Works("`min_new_tokens`, `ignore_eos`", f"{_COMBINED}::test_min_new_tokens_and_ignore_eos"),
    Works("JSON schema", f"{_COMBINED}::test_json_schema"),
    Works("regular expression", f"{_COMBINED}::test_regex"),
    Works(
        "output logprobs, top logprobs, token id logprobs",
        f"{_COMBINED}::test_output_logprobs",
        "of the pruned model; those of the prompt run dense",
    ),
    Works("`return_text_in_logprobs`", f"{_COMBINED}::test_return_text_in_logprobs"),
    Works(
        "frequency, presence and repetition penalties",
        f"{_COMBINED}::test_penalties",
        "over the same tokens as dense: penalties do not look at what was kept",
    ),
    Works("`logit_bias`", f"{_COMBINED}::test_logit_bias"),
    Works("custom logit processors", f"{_COMBINED}::test_custom_logit_processor"),
    Works("temperature, `top_p`, `top_k`, seeds", f"{_COMBINED}::test_temperature_and_seed"),
    Works(
        "priorities, with preemption",
        f"{_COMBINED}::test_priority_preempts_a_pruned_request_which_resumes_with_the_same_answer",
        "a preempted request resumes with what it had kept",
    ),
    Works(
        "`extra_key`, `cache_salt`",
        f"{_COMBINED}::test_extra_key_and_cache_salt",
        "as in stock, within the namespace of pruned requests",
    ),
    Works("chat and completions routes", f"{_COMBINED}::test_completions_with_penalties_and_logprobs"),
    Works("pausing, and updating weights", "test_weight_updates.py::test_requests_go_on_after_a_pause"),
    Works(
        "engines with and without CLAA in one process",
        "test_startup.py::test_engines_with_and_without_claa_in_one_process",
        "one after the other; one without it answers as stock, and one with it has its own settings",
    ),
    Works("aborts, timeouts, disconnects", "test_ways_out.py::test_an_abort"),
    Works(
        "retraction when memory is short",
        "test_retraction.py::test_retracted_requests_give_the_answers_they_give_undisturbed",
    ),
)


def markdown() -> str:
    """The document, with a newline at its end."""
    lines = [
        "# What can be combined with pruning",
        "",
        "Made by `python -m claa_sglang.combinations > docs/combinations.md` from the rules that decide.",
        "",
        "## Works pruned",
        "",
        "| feature | remark | shown by, in `tests/engine/` |",
        "|---|---|---|",
        *(f"| {row.feature} | {row.note} | `{row.test}` |" for row in WORKS),
        "",
        "## Runs dense, with its reason in the report",
        "",
        'The stock path, and `meta_info["claa"]` says `"pruned": false` and why. The first row that applies decides.',
        "",
        "| a request with | `reason` |",
        "|---|---|",
        *(f"| {rule.asks} | {rule.reason} |" for rule in dense_rules.RULES),
        "| more tokens than the KV pool has slots for, late ones included, where dense they fit "
        "| needs … early and late KV slots of a pool of … |",
        "",
        "## Refused with HTTP 400",
        "",
        'Anything else in `custom_params["claa"]` than',
        "",
        "| key | value |",
        "|---|---|",
        *(f"| `{key}` | {text} |" for key, text in options.allowed_keys().items()),
        "",
        "and what stock refuses: prompts longer than the context or the pool, parameters out of range.",
        "",
        "## Refused at start",
        "",
        "| rule | why | remedy |",
        "|---|---|---|",
        *(f"| {rule.id} | {_cell(rule.reason)} | {_cell(rule.remedy)} |" for rule in refusals.RULES),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
