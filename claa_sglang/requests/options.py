"""What one request may ask of CLAA, read from `custom_params["claa"]`.

Host-side only: no torch, no SGLang. The values come from an untrusted HTTP body, so nothing here raises
anything but RequestError, and nothing is coerced: `true` is not a number and `"0.4"` is not one either.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from claa_sglang.config.config import ClaaConfig, KeepRate, Layer, PolicyName, Window
from claa_sglang.ranking import spec

Positions = Annotated[tuple[Annotated[int, Meta(ge=0, lt=2**31)], ...], Meta(min_length=1)]

# key -> (type, what a user may write); the one source for validation and for the error text.
_KEYS: dict[str, tuple[Any, str]] = {
    "enabled": (bool, "true or false; default true"),
    "keep_rate": (KeepRate | None, "a number above 0 and at most 1; default --claa-keep-rate"),
    "policy": (PolicyName | None, '"auto" or "always"; default --claa-policy'),
    "ranker": (str | None, "a ranker such as claa or fastkv; default --claa-ranker"),
    "keep": (Positions | None, "ascending prompt positions; default those of the ranking"),
    "return_kept": (bool, "true or false; default false"),
    "finish": (bool, "true or false; default true"),
    "decode_dense_layers": (Layer | None, "--claa-decode-dense-layers, or all"),
    "explain": (bool, "true or false; default false"),
    "explain_window": (Window | None, "1 to 1024 tokens; default none"),
}


class RequestError(ValueError):
    """The request asks for something CLAA does not offer. The text names the key and its range (HTTP 400)."""


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of one request.

    enabled: False runs the request dense, as stock would.
    keep_rate: share of prompt tokens kept by the first prune step, in (0, 1]; None means the server's own.
    policy: "auto" prunes only where that is expected to be faster, "always" does; None means the server's own.
    ranker: what ranks its tokens, as `spec.parse` reads it; None means the server's own.
    keep: prompt positions to keep beside the window, ascending; None to rank.
    return_kept: report the kept positions in `meta_info["claa"]`.
    finish: False leaves what it caches pruned, where the server would make it dense when it is idle.
    decode_dense_layers: first layers in which its generated tokens read the whole prompt; None means the server's own.
    explain: report the kept positions, and the score of each token at each prune and in each layer that ranks.
    explain_window: last tokens of the prompt of which the report says what they look at; None for none.
    """

    enabled: bool = True
    keep_rate: KeepRate | None = None
    policy: PolicyName | None = None
    ranker: str | None = None
    keep: Positions | None = None
    return_kept: bool = False
    finish: bool = True
    decode_dense_layers: Layer | None = None
    explain: bool = False
    explain_window: Window | None = None


def parse_options(custom_params: object) -> RequestOptions:
    """Read and validate `custom_params["claa"]`.

    None, a mapping without "claa", and `"claa": null` give the defaults; other keys of `custom_params` belong
    to somebody else and are not looked at. Raises RequestError naming the key and the allowed values, and
    nothing else.
    """
    if custom_params is None:
        return RequestOptions()
    if not isinstance(custom_params, Mapping):
        raise RequestError(f"custom_params: expected an object, got {show(custom_params)}")
    raw = custom_params.get("claa")
    if raw is None:
        return RequestOptions()
    if not isinstance(raw, Mapping):
        raise RequestError(f"custom_params.claa: expected an object, got {show(raw)}. {_allowed()}")
    values: dict[str, Any] = {}
    for key, value in raw.items():
        if not isinstance(key, str) or key not in _KEYS:
            raise RequestError(f"custom_params.claa: unknown key {show(key)}. {_allowed()}")
        kind, text = _KEYS[key]
        try:
            values[key] = msgspec.convert(value, kind)
        except ValueError as error:  # ValidationError, or UnicodeEncodeError for a lone surrogate
            raise RequestError(f"custom_params.claa.{key}: got {show(value)}, must be {text}") from error
    options = RequestOptions(**values)
    _check_together(options)
    return options


def _check_together(options: RequestOptions) -> None:
    """What the types do not say. Raises RequestError."""
    if options.ranker is not None:
        try:
            spec.parse(options.ranker)
        except spec.RankerError as error:
            raise RequestError(f"custom_params.claa.ranker: {error}") from error
    if options.explain_window is not None and not options.explain:
        raise RequestError("custom_params.claa.explain_window: is part of an explanation; add explain, or leave it out")
    if options.keep is None:
        return
    if options.keep_rate is not None or options.ranker is not None:
        raise RequestError("custom_params.claa.keep: says what is kept; leave out keep_rate and ranker beside it")
    if any(a >= b for a, b in zip(options.keep, options.keep[1:], strict=False)):
        raise RequestError("custom_params.claa.keep: positions must ascend, each once; sort them")


def check_keep(options: RequestOptions, prompt_tokens: int) -> None:
    """Raises RequestError where `keep` names positions that a prompt of this length does not have."""
    if options.keep is not None and options.keep[-1] >= prompt_tokens:
        raise RequestError(
            f"custom_params.claa.keep: position {options.keep[-1]} is beyond the prompt of {prompt_tokens} tokens"
        )


def check_decoding(options: RequestOptions, config: ClaaConfig) -> None:
    """Raises RequestError where `decode_dense_layers` is neither the server's own nor all layers before the prune."""
    asked, own, end = options.decode_dense_layers, config.decode_dense_layers, config.steps[0].prune_layer + 1
    if asked is None or asked == own or asked >= end:
        return
    offered = f"{end} or more, which is every layer before the prune"
    raise RequestError(
        f"custom_params.claa.decode_dense_layers: {asked}: this server was started "
        + (
            f"with --claa-decode-dense-layers {own}; give {own}, or {offered}"
            if config.kept_layers
            else f"without --claa-decode-dense-layers; give {offered}, or leave it out"
        )
    )


def check_explain(options: RequestOptions, config: ClaaConfig, prompt_tokens: int | None, most: int | None) -> None:
    """Raises RequestError where a request may not be explained, or its `explain_window` has no room.

    prompt_tokens: of its prompt; None where they are not known. most: tokens that the last chunk of a prompt can have
    for sure (`start.server_config.largest_window`); None where prompts are not cut.
    """
    if not options.explain:
        return
    if not config.allow_explain:
        raise RequestError(
            "custom_params.claa.explain: this server was started without --claa-allow-explain; start it with that "
            "flag, or leave explain out"
        )
    window = options.explain_window
    if window is None:
        return
    if prompt_tokens is not None and window >= prompt_tokens:
        raise RequestError(
            f"custom_params.claa.explain_window: {window} tokens leave nothing to look at in a prompt of "
            f"{prompt_tokens}; give fewer"
        )
    if most is not None and window > most:
        raise RequestError(
            f"custom_params.claa.explain_window: {window} tokens do not fit a prefill step; give at most {most}, or "
            "start the server with a larger --chunked-prefill-size"
        )


def allowed_keys() -> dict[str, str]:
    """Every key of `custom_params["claa"]`, and what it may be, in words."""
    return {key: text for key, (_, text) in _KEYS.items()}


def _allowed() -> str:
    return "Allowed keys: " + "; ".join(f"{key} ({text})" for key, text in allowed_keys().items())


def show(value: object) -> str:
    """A short, printable rendering that cannot fail: the value is the client's, the text an HTTP body."""
    try:
        text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
        return f"{text[:100]} ({type(value).__name__})"
    except Exception:  # e.g. an int beyond the interpreter's digit limit, or a __repr__ that raises
        return f"a value of type {type(value).__name__}"
