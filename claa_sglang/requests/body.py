"""Where a JSON body says what it asks of CLAA, and what the server's own defaults add to that.

Host-side only. Bodies are untrusted JSON of any shape; nothing here raises anything but RequestError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from claa_sglang.requests.options import RequestError, parse_options, show
from claa_sglang.requests.report import KEY

# Where `custom_params` may stand in a body; which of them is read depends on the route (routes.py).
TOP = "custom_params"
SAMPLING = "sampling_params.custom_params"
OPTIONS = "options.custom_params"
PARAMETERS = "parameters.sampling_params.custom_params"
PLACES = (TOP, SAMPLING, OPTIONS, PARAMETERS, "parameters.custom_params", "extra_body.custom_params")


def values_at(body: object, place: str) -> list[Any]:
    """The values at a dotted place of a body; several where a step on the way is a list, as a batch may have one."""
    found = [body]
    for name in place.split("."):
        items = [item for value in found for item in (value if isinstance(value, list) else [value])]
        found = [item[name] for item in items if isinstance(item, Mapping) and name in item]
    return found


def check_body(body: object, place: str | None) -> Mapping[str, Any] | None:
    """The options that a body of one request has at `place`, as they were written; None where it has none.

    place: where its route reads them; None for a route that does not prune. Raises RequestError for options that
    are not valid, and for options at another place, which nobody would read.
    """
    asked: Mapping[str, Any] | None = None
    if not isinstance(body, Mapping):
        return None
    for custom_params in values_at(body, place) if place else ():
        parse_options(custom_params)
        asked = (custom_params or {}).get(KEY)
    remedy = f"give it in {place}" if place else "leave it out: this route does not prune"
    for other in PLACES:
        if other != place and any(_has_options(value) for value in values_at(body, other)):
            raise RequestError(f"{other}.{KEY}: not read on this route; {remedy}")
    if _has_options(body):
        raise RequestError(f"{KEY}: not read at the top of a body; {remedy}")
    return asked


def with_defaults(custom_params: Any, preferred: object) -> Any:
    """`custom_params` of a request, with the server's default options where the request has no key of its own.

    preferred: the server's --preferred-sampling-params, None without. Only the options of CLAA are merged key by key;
    whatever else is in `custom_params` stays as SGLang has it. What is not valid is returned as it is.
    """
    defaults = _defaults(preferred)
    if not defaults or not (custom_params is None or isinstance(custom_params, Mapping)):
        return custom_params
    own = (custom_params or {}).get(KEY)
    if own is None:
        own = {}
    if not isinstance(own, Mapping):
        return custom_params
    # Positions that a request gives say what is kept, in place of a rate and a ranker.
    replaced = ("keep_rate", "ranker") if own.get("keep") is not None else ()
    merged = {**{key: value for key, value in defaults.items() if key not in replaced}, **own}
    return {**(custom_params or {}), KEY: merged}


def wrong_defaults(preferred: object) -> str | None:
    """What is wrong with --preferred-sampling-params, with the range; None if every request can have it."""
    if preferred is None:
        return None
    if not isinstance(preferred, Mapping):
        return f"expected an object, got {show(preferred)}"
    try:
        options = parse_options(preferred.get("custom_params"))
    except RequestError as error:
        return str(error)
    if options.keep is not None:
        return f"custom_params.{KEY}.keep: positions are those of one prompt; give keep_rate, or keep in each request"
    if options.explain:
        return f"custom_params.{KEY}.explain: a report for each request would be large; give it in single requests"
    return None


def _defaults(preferred: object) -> Mapping[str, Any]:
    custom_params = preferred.get("custom_params") if isinstance(preferred, Mapping) else None
    return (custom_params.get(KEY) if isinstance(custom_params, Mapping) else None) or {}


def _has_options(value: object) -> bool:
    return isinstance(value, Mapping) and value.get(KEY) is not None
