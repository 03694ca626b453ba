"""What a finished request reports: `meta_info["claa"]`, and the same in the metadata of OpenAI responses."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from claa_sglang.requests.explanation import explanation

if TYPE_CHECKING:
    from claa_sglang.requests.state import RequestState

KEY = "claa"  # of meta_info, of metadata, and of /server_info
CHOSEN = "chosen by --claa-policy auto"
FINISHED = "its prefix was finished while the server was idle"

Report = dict[str, Any]


def build_report(state: RequestState, cached_tokens: int) -> Report:
    """The report of a request, as JSON values. Counts are in prompt tokens.

    `policy` is there where the policy chose, and `reason` then has its estimates. `finished_tokens`, of a request that
    went dense, are its first tokens that an earlier pruned request had cached, and that were made dense since.
    `would_keep`, of a server that observes, is what a prune would have kept.
    cached_tokens: prompt tokens that were in the prefix cache when the request was first scheduled.
    With `options.explain`, `explain` is as `explanation` says, and `kept` is there too.
    With several prune steps the top-level values are the first step's, and `steps` lists all. With
    `options.return_kept`, `kept` are the kept prompt positions, ascending; that copies them from the device
    (one wait, for requests that ask). Positions of a step that was not ranked (an early abort) are left out.
    """
    plan, why = state.plan, state.decision.why
    if not state.pruned:
        return {
            "pruned": False,
            "reason": plan.dense_reason,
            **_policy(state),
            "prompt_tokens": plan.prompt_tokens,
            "kept_tokens": plan.prompt_tokens,
            "early_cached_tokens": cached_tokens,
            **({"finished_tokens": state.decision.finished} if state.decision.finished else {}),
            **({"would_keep": _observed(state)} if state.observed else {}),
            **_explain(state),
        }
    steps = [_step(state, index) for index in range(len(plan.steps))]
    report: Report = {
        "pruned": True,
        **({} if why is None else {"reason": why}),
        **_policy(state),
        "prompt_tokens": plan.prompt_tokens,
        "early_cached_tokens": cached_tokens,
        "late_computed_tokens": state.progress.late_computed_tokens,
        "ranker": "given" if plan.options.keep is not None else str(plan.ranker),
        **steps[0],
        **({} if plan.decode_dense_layers is None else {"decode_dense_layers": plan.decode_dense_layers}),
        **_explain(state),
    }
    if len(steps) > 1:
        report["steps"] = steps
    return report


def shown(report: Report, cache_report: bool) -> Report:
    """`report` for a route where cached counts are shown with `cache_report` alone, as they tell what others asked.

    Without it, the cached tokens, and reasons that tell of them, are left out. Whether the request was pruned stays.
    """
    if cache_report:
        return report
    kept = {key: value for key, value in report.items() if key not in ("early_cached_tokens", "finished_tokens")}
    if "policy" in report:
        return {**kept, "reason": CHOSEN}
    return {**kept, "reason": FINISHED} if "finished_tokens" in report else kept


def with_metadata(text: str, report: Report) -> str:
    """`text`, which ends with a JSON object, with `report` in the object's `metadata`; the rest as it was written."""
    end = text.rindex("}")
    metadata = json.dumps({"metadata": {KEY: report}}, separators=(",", ":"))
    return f"{text[:end]},{metadata[1:]}{text[end + 1 :]}"


def safe_report(state: RequestState | None, cached_tokens: int) -> Report | None:
    """As `build_report`, but it never raises: a report is not worth a server. None without a state."""
    if state is None:
        return None
    try:
        return build_report(state, cached_tokens)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"}


def _policy(state: RequestState) -> Report:
    """Marks a report whose `reason` has the policy's estimates."""
    return {} if state.decision.why is None else {"policy": "auto"}


def _explain(state: RequestState) -> Report:
    return {"explain": explanation(state)} if state.plan.options.explain else {}


def _observed(state: RequestState) -> Report | None:
    """What a prune would have kept; None where the prompt was not ranked: too little of it was computed in one step."""
    if state.progress.kept[0] is None:
        return None
    plan = state.plan
    return {"ranker": "given" if plan.options.keep is not None else str(plan.ranker), **_step(state, 0)}


def _step(state: RequestState, index: int) -> Report:
    plan, step = state.plan, state.plan.steps[index]
    values: Report = {
        "kept_tokens": plan.kept_counts[index],
        "keep_rate": step.keep_rate if plan.options.keep is None else None,
        "prune_layer": step.prune_layer,
        "score_layers": list(step.score_layers),
    }
    kept = state.progress.kept[index]
    if (plan.options.return_kept or plan.options.explain) and kept is not None:
        values["kept"] = kept.tolist()
    return values
