"""The scheduler's output carries the report of each request that finishes."""

from __future__ import annotations

from typing import Any

from claa_sglang.patches import attached
from claa_sglang.patches.hooks import Hook
from claa_sglang.requests.report import KEY, safe_report


def reporting(base: Any, _scheduler: Any = None) -> type:
    """AFTER Scheduler.get_output_streamer_class: `base`, SGLang's or another plugin's, that also reports."""

    class ReportingStreamer(base):
        has_additional_customized_info = True

        def should_build_additional_customized_info(self) -> bool:
            # What the base wants is asked below; a finished request is only seen there.
            return True

        def build_additional_customized_info(self, reqs: list[Any]) -> dict[str, list]:
            """One list per request of `reqs`: its report where it finished here, else empty."""
            info: dict[str, list] = {}
            if base.has_additional_customized_info and super().should_build_additional_customized_info():
                info = super().build_additional_customized_info(reqs)
            # Nothing at all in the other steps, so that SGLang does not pickle a field for them.
            if any(req.finished_reason is not None for req in reqs):
                info[KEY] = [_reports(req) for req in reqs]
            return info

    return ReportingStreamer


def _reports(req: Any) -> list[Any]:
    if req.finished_reason is None:
        return []
    report = safe_report(attached.state.find(req), req.cached_tokens)
    return [] if report is None else [report]


HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class",
        params=("self",),
        kind="after",
        fn=reporting,
        process="scheduler",
        reason="SGLang's own extension point for values that a request reports with its output",
    ),
)
