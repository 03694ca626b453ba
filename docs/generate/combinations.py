"""docs/combinations.md: what can be combined with pruning, as a document made from the rules themselves.

A test compares the two, and looks for every test that is named.
"""

from __future__ import annotations

from typing import NamedTuple

from claa_sglang.config import attention_backends, refusals
from claa_sglang.requests import dense_rules, options, report, routes


class Works(NamedTuple):
    """Something users combine with a pruned request, and the engine test that shows it works."""

    feature: str
    test: str
    note: str = ""


_COMBINED = "test_combinations.py"
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
    Works(
        "`--forward-hooks`, `--debug-tensor-dump-*`, `--expert-distribution-recorder-mode stat`",
        "test_recorders.py::test_each_layer_is_seen_with_its_own_rows",
        "each layer is seen once a forward, with the rows it has: after a prune, those that were kept",
    ),
    Works(
        "`--tokenizer-worker-num`",
        "test_tokenizer_workers.py::test_every_worker_checks_and_reports",
        "each worker checks what it is sent; one that cannot stops the server",
    ),
    Works("chat and completions routes", f"{_COMBINED}::test_completions_with_penalties_and_logprobs"),
    Works("pausing, and updating weights", "test_weight_updates.py::test_requests_go_on_after_a_pause"),
    Works(
        "engines with and without CLAA in one process",
        "test_startup.py::test_engines_with_and_without_claa_in_one_process",
        "one after the other; one without it answers as stock, and one with it has its own settings",
    ),
    Works(
        "`--claa-decode-dense-layers`",
        "test_decode_kept.py::test_together_and_retracted",
        "early layers decode over kept tokens; follow-ups compute the answer before them anew",
    ),
    Works(
        "`--claa-mode observe`",
        "test_observe.py::test_answers_are_stock_s_and_the_report_says_what_would_be_kept",
        "nothing is dropped; one prune, on the CPU engine so far",
    ),
    Works(
        "`explain`, with `--claa-allow-explain`",
        "test_explain.py::test_scores_are_the_reference_s_and_the_answer_is_the_same",
        "not with `--tp-size` above 1",
    ),
    Works(
        "`--claa-shadow-rate`",
        "test_shadow.py::test_a_client_that_arrives_ends_it_and_gets_its_answer",
        "answers are held against the dense model while no client waits; on the CPU engine so far",
    ),
    Works("aborts, timeouts, disconnects", "test_ways_out.py::test_an_abort"),
    Works(
        "retraction when memory is short",
        "test_retraction.py::test_retracted_requests_give_the_answers_they_give_undisturbed",
    ),
)


ROUTES = """\
## Routes

Where a body asks, and where the answer says what came of it.

| route | asks in | report of a whole answer | of a stream |
|---|---|---|---|
{rows}

A value out of its range is HTTP 400 on each, streamed or not, and so are options at a place where the route does
not read them. A `keep` beyond the prompt is known only once the prompt is tokenized, and so is an `explain` that the
server does not allow: where SGLang has sent the status of a stream by then, the stream ends with an error.

{dense} run dense, and options there are HTTP 400.
{health} send one token, which is dense.
{other_models}
are for models that `--enable-claa` is refused with. No prompt of another route reaches the scheduler.

Outside `/generate` and `/vertex_generate`, SGLang shows how many tokens were cached with `--enable-cache-report`
only, as that tells a client what others asked. Reports follow it there: without it they have no
`early_cached_tokens`, and in place of a `reason` with the policy's estimates "{chosen}".
Whether a request was pruned stays.

### The server's defaults

`--preferred-sampling-params '{{"custom_params": {{"claa": {{"keep_rate": 0.5}}}}}}'` counts on every route, key by
key: a request that gives other keys keeps the default rate, its own `keep_rate` replaces it, and `null` stands for
the server's `--claa-keep-rate`. A request's `keep` replaces a default `keep_rate` and `ranker`. Other
`custom_params` are merged as SGLang merges them. Bad values stop the start, and so does a default `keep` or
`explain`.

"""


def markdown() -> str:
    """The document, with a newline at its end."""
    lines = [
        "# What can be combined with pruning",
        "",
        "Made by `python -m docs.generate` from the rules that decide.",
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
        *_routes(),
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
        "## Attention backends",
        "",
        "| `--attention-backend` | run on | larger pages | fp8 KV | over kept | observe | decode graphs "
        "| host waits of a plan |",
        "|---|---|---|---|---|---|---|---|",
        *(_backend(backend) for backend in attention_backends.BACKENDS),
        "",
        "## Refused at start",
        "",
        "| rule | why | remedy |",
        "|---|---|---|",
        *(f"| {rule.id} | {_cell(rule.reason)} | {_cell(rule.remedy)} |" for rule in refusals.RULES),
    ]
    return "\n".join(lines) + "\n"


def _backend(backend: attention_backends.AttentionBackend) -> str:
    waits = "one, and one more for each prune" if backend.plan_waits else "none"
    has = (backend.pages, backend.fp8, backend.kept, backend.observe, backend.decode_graphs)
    run = " | ".join("yes" if one else "no" for one in has)
    return f"| `{backend.name}` | {backend.device} | {run} | {waits} |"


def _routes() -> list[str]:
    rows = [f"| `{row.path}` | `{row.place}` | {row.report} | {row.streamed} |" for row in routes.PRUNES]
    names = {"dense": routes.DENSE, "health": routes.HEALTH, "other_models": routes.OTHER_MODELS}
    listed = {name: _paths(paths) for name, paths in names.items()}
    return ROUTES.format(rows="\n".join(rows), chosen=report.CHOSEN, **listed).splitlines()


def _paths(paths: tuple[str, ...]) -> str:
    return ", ".join(f"`{path}`" for path in paths[:-1]) + f" and `{paths[-1]}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
