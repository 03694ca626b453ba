"""What one HTTP request asks of CLAA and what came of it, on routes whose own records have no field for it.

The context of the request's task carries it from the route's handler to the tokenizer manager and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from claa_sglang.body import check_body
from claa_sglang.requests.report import KEY, Report, shown


@dataclass(slots=True)
class Ask:
    """Options as the body has them, None without any; and the report, once the request is done."""

    options: Mapping[str, Any] | None
    reports: dict[int, Report] = field(default_factory=dict)

    @property
    def report(self) -> Report | None:
        return next(iter(self.reports.values()), None)

    def put_into(self, obj: Any) -> None:
        """Give the options to SGLang's GenerateReqInput `obj`, where it keeps those of /generate."""
        if self.options is not None:
            params = obj.sampling_params or {}
            custom_params = {**(params.get("custom_params") or {}), KEY: self.options}
            obj.sampling_params = {**params, "custom_params": custom_params}


_current: ContextVar[Ask | None] = ContextVar("claa_ask", default=None)


def current() -> Ask | None:
    """What the HTTP request being served asks; None on routes that need no such record, and outside of any."""
    return _current.get()


async def begin(raw_request: Any, place: str) -> Ask:
    """Read the options in the body of `raw_request`, for the rest of its task. Raises RequestError, for an HTTP 400."""
    ask = Ask(check_body(await body_of(raw_request), place))
    _current.set(ask)
    return ask


async def body_of(raw_request: Any) -> Any:
    """The JSON body of a request, which SGLang has parsed and kept; None without a request."""
    return None if raw_request is None else await raw_request.json()


def as_shown(report: Report) -> Report:
    """The report as routes show it where SGLang shows cached counts only with --enable-cache-report."""
    from sglang.srt.runtime_context import get_serving

    return shown(report, get_serving().enable_cache_report)
