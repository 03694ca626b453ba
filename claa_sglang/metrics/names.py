"""Every metric, as a table: names begin as SGLang's own do. docs/metrics.md is made from it."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """One metric.

    labels: beside those that SGLang gives its own metrics of the same process. text: for `# HELP`.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()


# Of the process that a client talks to: written when a request ends.
REQUESTS = Metric(
    "sglang:claa_requests_total",
    "counter",
    "Requests by outcome (pruned, dense, failed) and by what decided on it.",
    ("outcome", "reason"),
)
PROMPT_TOKENS = Metric(
    "sglang:claa_prompt_tokens_total",
    "counter",
    "Prompt tokens of pruned requests: those that went on to the late layers (kept), and those that did not (dropped).",
    ("part",),
)
CACHED_TOKENS = Metric(
    "sglang:claa_cached_tokens_total",
    "counter",
    "Prompt tokens found in the prefix cache: left by pruned requests (pruned), by dense ones (dense), or made dense "
    "while the server was idle (finished).",
    ("namespace",),
)
TTFT = Metric(
    "sglang:claa_time_to_first_token_seconds",
    "histogram",
    "Time to the first token of requests that were pruned and of those that ran dense.",
    ("outcome",),
)

# Of the same process: written when a shadow request (--claa-shadow-rate) is over.
SHADOWS = Metric(
    "sglang:claa_shadow_requests_total",
    "counter",
    "Drawn pruned requests: the dense answer is the same or different, or it was dropped, or failed.",
    ("result", "sampling"),
)
SHADOW_TOKENS = Metric(
    "sglang:claa_shadow_tokens_total",
    "counter",
    "Tokens of pruned answers that are the dense model's most likely ones (yes), and that are not (no).",
    ("agrees", "sampling"),
)

# Of each scheduler: written whenever SGLang writes its own, and after each step of finishing.
LATE_SLOTS = Metric("sglang:claa_late_slots_held", "gauge", "KV slots in which late layers keep what requests kept.")
WAITING = Metric(
    "sglang:claa_finish_prefixes_waiting", "gauge", "The number of pruned prefixes that wait to be finished."
)
FINISHED = Metric(
    "sglang:claa_finish_prefixes_total", "counter", "Pruned prefixes that were made dense while the server was idle."
)
DROPPED = Metric(
    "sglang:claa_finish_dropped_total", "counter", "Pruned prefixes that were given up: no room, or an error."
)
FINISH_TOKENS = Metric("sglang:claa_finish_tokens_total", "counter", "Tokens of pruned prefixes that were made dense.")
FINISH_SECONDS = Metric("sglang:claa_finish_seconds_total", "counter", "Seconds that finishing pruned prefixes took.")
SCORE_SECONDS = Metric(
    "sglang:claa_score_seconds_total", "counter", "Seconds of the device in which prompt tokens were scored."
)
PRUNE_SECONDS = Metric(
    "sglang:claa_prune_seconds_total",
    "counter",
    "Seconds of the device in which prompt tokens were ranked, and rows of those that were kept moved.",
)
POLICY_STEPS = Metric("sglang:claa_policy_steps_total", "counter", "Prefill steps that the policy has learned from.")
POLICY_EXPECTED = Metric(
    "sglang:claa_policy_expected_seconds_total", "counter", "Seconds that the policy expected those steps to take."
)
POLICY_MEASURED = Metric("sglang:claa_policy_measured_seconds_total", "counter", "Seconds that those steps took.")

OF_REQUESTS = (REQUESTS, PROMPT_TOKENS, CACHED_TOKENS, TTFT)
OF_SHADOWS = (SHADOWS, SHADOW_TOKENS)
OF_SCHEDULERS = (
    *(LATE_SLOTS, WAITING, FINISHED, DROPPED, FINISH_TOKENS, FINISH_SECONDS),
    *(SCORE_SECONDS, PRUNE_SECONDS),
    *(POLICY_STEPS, POLICY_EXPECTED, POLICY_MEASURED),
)
