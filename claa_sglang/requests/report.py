"""What a finished request reports: `meta_info["claa"]`, and the same in the metadata of OpenAI responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from claa_sglang.requests.state import RequestState

KEY = "claa"  # of meta_info, of metadata, and of /server_info

Report = dict[str, Any]


def build_report(state: RequestState, cached_tokens: int) -> Report:
    """The report of a request, as JSON values. Counts are in prompt tokens.

    cached_tokens: prompt tokens that were in the prefix cache when the request was first scheduled.
    With several prune steps the top-level values are the first step's, and `steps` lists all. With
    `options.return_kept`, `kept` are the kept prompt positions, ascending; that copies them from the device
    (one wait, for requests that ask). Positions of a step that was not ranked (an early abort) are left out.
    """
    if not state.pruned:
        return {
            "pruned": False,
            "reason": state.reason,
            "prompt_tokens": state.prompt_tokens,
            "kept_tokens": state.prompt_tokens,
            "early_cached_tokens": cached_tokens,
        }
    steps = [_step(state, index) for index in range(len(state.steps))]
    report: Report = {
        "pruned": True,
        **({} if state.choice is None else {"reason": state.choice}),
        "prompt_tokens": state.prompt_tokens,
        "early_cached_tokens": cached_tokens,
        "late_computed_tokens": state.late_computed_tokens,
        "ranker": "given" if state.options.keep is not None else str(state.ranker),
        **steps[0],
    }
    if len(steps) > 1:
        report["steps"] = steps
    return report


def safe_report(state: RequestState | None, cached_tokens: int) -> Report | None:
    """As `build_report`, but it never raises: a report is not worth a server. None without a state."""
    if state is None:
        return None
    try:
        return build_report(state, cached_tokens)
    except Exception as error:  # noqa: BLE001
        return {"error": f"{type(error).__name__}: {error}"}


def _step(state: RequestState, index: int) -> Report:
    step = state.steps[index]
    values: Report = {
        "kept_tokens": state.kept_counts[index],
        "keep_rate": step.keep_rate if state.options.keep is None else None,
        "prune_layer": step.prune_layer,
        "score_layers": list(step.score_layers),
    }
    kept = state.kept[index]
    if state.options.return_kept and kept is not None:
        values["kept"] = kept.tolist()
    return values
