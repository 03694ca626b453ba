"""Operator flags, and a profile where one is named, become the configuration of one model."""

from __future__ import annotations

import math
import os
import re
from typing import Any

import msgspec
from msgspec import UNSET

from claa_sglang.config.config import (
    MAX_QUOTED,
    ChunkTokens,
    ClaaConfig,
    ConfigError,
    FinishName,
    KeepRate,
    Layer,
    ModeName,
    PolicyName,
    PoolKernel,
    PromptTokens,
    ScorerName,
    ShadowRate,
    Window,
    short,
)
from claa_sglang.config.profile_file import Profile, ProfileStep, load_profile
from claa_sglang.config.profile_model import ProfileModel
from claa_sglang.config.state_room import Room
from claa_sglang.ranking import spec

DEFAULT_KEEP_RATE = 0.2
AUTO, NONE = "auto", "none"  # of --claa-profile; a file of such a name is written ./auto
FORMER_RANKER = "claa:paper"  # of profiles whose calibration names none: it measured the paper's rule
DEFAULT_SCORED = 4  # layers, the last ones up to the prune layer
# One step of a schedule: layer:rate, or layer:rate:scored+scored.
_STEP = re.compile(
    r"(?P<layer>\d{1,4}):(?P<rate>\d{0,20}\.?\d{1,20}(e-?\d{1,3})?)(:(?P<scored>\d{1,4}(\+\d{1,4})*))?", re.ASCII
)

# field of ClaaFlags -> what may be written, with unit, range and default; --help and the errors share it.
HELP: dict[str, str] = {
    "keep_rate": "share of the prompt tokens that go on to the late layers: above 0, at most 1 (default 0.2)",
    "prune_layer": (
        "layer after whose MLP tokens are dropped: 0 to L-2 of a model's L, or to the last one whose later layers' KV "
        "rows can hold a token's state, which an error names (default L//2 - 1)"
    ),
    "score_layers": (
        "layers whose attention ranks the tokens, none above the prune layer: a count n, such as 4, for the "
        "last n up to the prune layer, or an ascending list, such as 8,12,14,17; one layer alone is written "
        "with a comma, such as 14, (default 4, or fewer where the prune layer is below 3)"
    ),
    "schedule": (
        "prune steps, instead of one prune layer, keep rate and score layers: layer:rate for each step, such as "
        "14:0.4,20:0.15 (quoted in a YAML file), layers ascending and rates (shares of the whole prompt) descending; "
        "layers that rank may follow, such as 14:0.4:12+14,20:0.15:18+20 (default the last 4 up to the prune layer, "
        "above the previous one)"
    ),
    "window": "prompt tokens at the end that score the others and are always kept: 1 to 1024 (default 32)",
    "pool_kernel": "tokens over which scores are averaged: odd, 1 to 1023 (default 7)",
    "ranker": f"what ranks the prompt tokens: {spec.HELP} (default claa)",
    "scorer": (
        "what computes the scores on a GPU: triton, flashinfer (the log-sum-exp of the window's queries from "
        "FlashInfer's paged attention, the rest in Triton), torch (one request after the other), or auto, which takes "
        "the faster of the first two by a measurement at start, and triton where FlashInfer's kernel is not compiled; "
        "a CPU scores in torch (default auto)"
    ),
    "min_prompt_tokens": "prompts shorter than this many tokens run dense: 0 or more (default 1024)",
    "mode": (
        "prune, or observe: rank every prompt that could be pruned, say in its report what would be kept, and drop "
        "nothing (default prune)"
    ),
    "policy": (
        "auto prunes a prompt only where that is expected to be faster, given what is cached; always prunes every "
        "prompt that can be (default auto)"
    ),
    "finish": (
        "idle runs the late layers of dropped tokens while the server has nothing else to do, after which a pruned "
        "prefix is an ordinary dense one; off never does (default idle)"
    ),
    "finish_chunk": (
        "prompt tokens of one step of finishing, at most: 1 or more; a request that arrives waits for the step that "
        "runs (default what takes about 10 ms beside launching)"
    ),
    "decode_dense_layers": (
        "first layers in which generated tokens attend to the whole prompt: 0 or more; from there to the prune layer "
        "they attend to what was kept of it, and later layers have no more (default all up to the prune layer)"
    ),
    "allow_explain": (
        "let requests ask for the score of each prompt token in their reports, as claa-sglang explain does; a report "
        "then grows with the prompt, and says what each of its tokens counted for (default off)"
    ),
    "shadow_rate": (
        "share of the pruned requests that are answered dense as well, while no client waits, to compare the answers: "
        "0 to 1 (default 0)"
    ),
    "profile": (
        "JSON file with these values, as a calibration writes it; an explicit flag wins over it. auto looks for one "
        "that fits the model, first where calibrations leave a copy (CLAA_PROFILES, or ~/.cache/claa-sglang/profiles), "
        "then among the shipped ones, and a start that finds none warns once; none takes the paper's layers (default "
        "auto)"
    ),
}


SWITCHES = ("allow_explain",)  # flags without a value


class ClaaFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator typed; None means not given. HELP says what each may be."""

    keep_rate: float | None = None
    prune_layer: int | None = None
    score_layers: str | None = None
    schedule: str | None = None
    window: int | None = None
    pool_kernel: int | None = None
    ranker: str | None = None
    scorer: str | None = None
    min_prompt_tokens: int | None = None
    mode: str | None = None
    policy: str | None = None
    finish: str | None = None
    finish_chunk: int | None = None
    decode_dense_layers: int | None = None
    allow_explain: bool | None = None
    shadow_rate: float | None = None
    profile: str | None = None


def resolve(
    flags: ClaaFlags, num_layers: int, served: ProfileModel | None = None, room: Room | None = None
) -> ClaaConfig:
    """The configuration for a model of `num_layers` layers: explicit flags, then the profile, then defaults.

    A profile counts where it is named by path: who looks for one (`profile_choice.py`) puts its path into the flags.
    served: the model, which a profile must have been made for; None where only its depth is known.
    room: what its KV rows can hold, which bounds the prune layers; None where that is not known.

    A schedule gives all prune steps. Otherwise flags describe the first one, further ones come from a profile, and
    their rates follow an explicit keep rate (`with_keep_rate`). Raises ConfigError, and nothing else, for anything
    that cannot be used.
    """
    if num_layers < 2:
        raise ConfigError(f"--enable-claa: {num_layers} layer has no late layers; run the model without CLAA")
    path = profile_path(flags)
    profile = None if path is None else load_profile(path, num_layers, served)
    common = _given(profile, ("window", "pool_kernel", "ranker", "min_prompt_tokens"))
    if profile is not None and profile.ranker is UNSET and "made by" in profile.provenance:
        common["ranker"] = FORMER_RANKER
    for name, kind in (("window", Window), ("pool_kernel", PoolKernel), ("min_prompt_tokens", PromptTokens)):
        if (value := getattr(flags, name)) is not None:
            common[name] = _checked(name, value, kind)
    if flags.mode is not None:
        common["mode"] = _checked("mode", flags.mode, ModeName)
    if flags.policy is not None:
        common["policy"] = _checked("policy", flags.policy, PolicyName)
    if flags.ranker is not None:
        common["ranker"] = _checked("ranker", flags.ranker, str)
    if flags.scorer is not None:
        common["scorer"] = _checked("scorer", flags.scorer, ScorerName)
    if flags.finish is not None:
        common["finish"] = _checked("finish", flags.finish, FinishName)
    if flags.finish_chunk is not None:
        common["finish_chunk"] = _checked("finish_chunk", flags.finish_chunk, ChunkTokens)
    if flags.decode_dense_layers is not None:
        common["decode_dense_layers"] = _checked("decode_dense_layers", flags.decode_dense_layers, Layer)
    if flags.allow_explain is not None:
        common["allow_explain"] = _checked("allow_explain", flags.allow_explain, bool)
    if flags.shadow_rate is not None:
        common["shadow_rate"] = _checked("shadow_rate", flags.shadow_rate, ShadowRate)

    origins = []
    if flags.schedule is None:
        steps = _steps_of(flags, profile.steps if profile is not None else (), num_layers)
    else:
        steps = _parse_schedule(flags)
        origins.append(f"prune steps come from --claa-schedule {flags.schedule}: correct it")
    if profile is not None:
        origins.append(
            f"values not given as flags come from --claa-profile {flags.profile}: correct it, or leave it out"
        )
    raw = {"steps": steps, "num_layers": num_layers, "profile": path, **common}
    try:
        config = msgspec.convert(raw, ClaaConfig)
        if flags.keep_rate is not None:
            config = config.with_keep_rate(_checked("keep_rate", flags.keep_rate, KeepRate))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error} ({'; '.join(origins)})" if origins else str(error)) from error
    if room is not None:
        room.check(config, _origin_of_layers(flags, profile))
    return config


def profile_path(flags: ClaaFlags) -> str | None:
    """The profile that the flags name by path; None for auto, none and nothing."""
    return None if flags.profile in (None, AUTO, NONE) else flags.profile


def _origin_of_layers(flags: ClaaFlags, profile: Profile | None) -> str:
    """What gave the prune layers, for an error."""
    if flags.schedule is not None:
        return f"--claa-schedule {flags.schedule}"
    given = [] if flags.prune_layer is None else [f"--claa-prune-layer {flags.prune_layer}"]
    if profile is not None and profile.steps:
        given.append(f"--claa-profile {flags.profile}")
    return " and ".join(given) or "--claa-prune-layer, by its default"


def _steps_of(flags: ClaaFlags, profile_steps: tuple[ProfileStep, ...], num_layers: int) -> list[dict[str, Any]]:
    """The prune steps of flags and profile, each as the fields of a PruneStep."""
    names = ("prune_layer", "keep_rate", "score_layers")
    first, *later = [_given(step, names) for step in profile_steps or (ProfileStep(),)]
    first.setdefault("keep_rate", DEFAULT_KEEP_RATE)
    if flags.prune_layer is not None:
        first["prune_layer"] = _checked("prune_layer", flags.prune_layer, Layer)
    prune_layer = first.setdefault("prune_layer", num_layers // 2 - 1)
    if flags.score_layers is not None:
        first["score_layers"] = _parse_score_layers(flags.score_layers, prune_layer)
    elif "score_layers" not in first:
        first["score_layers"] = _last_layers(min(DEFAULT_SCORED, prune_layer + 1), prune_layer)
    return [first, *later]


def _given(record: msgspec.Struct | None, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the named values that a profile record gives."""
    values = {} if record is None else {name: getattr(record, name) for name in names}
    return {name: value for name, value in values.items() if value is not UNSET}


def _flag(name: str) -> str:
    return "--claa-" + name.replace("_", "-")


def _checked(name: str, value: object, kind: Any) -> Any:
    """`value` if it has the type and range of `kind`; else ConfigError with the flag's own help."""
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:  # ValidationError, or UnicodeEncodeError for a lone surrogate
        raise ConfigError(f"{_flag(name)} {value!r}: {error}. Give the {HELP[name]}") from error


def written(name: str, value: Any) -> Any:
    """A value of flag `name` from Python as a command line has it; one that needs nothing, or is wrong, as it is.

    Lists of layers and of steps, a count as a number, paths. Raises ConfigError.
    """
    if name == "profile" and isinstance(value, os.PathLike):
        return os.fspath(value)
    if name == "score_layers" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name not in ("score_layers", "schedule") or not isinstance(value, list | tuple):
        return value
    if not value:
        raise ConfigError(f"{_flag(name)} {value!r}: is an empty list. Give the {HELP[name]}")
    if name == "score_layers":
        return "".join(f"{layer}," for layer in value)
    for step in value:
        if hint := _as_number(step):
            raise ConfigError(f"{_flag(name)} {short(value)}: {hint}")
    return ",".join(map(str, value))


def from_config_file(name: str, value: Any) -> Any:
    """A value of flag `name` that YAML read, for a command line. Raises ConfigError, which says how to write it."""
    key = "claa-" + name.replace("_", "-")
    if value is None:
        raise ConfigError(f"{key}: has no value. Leave the line out, or give the {HELP[name]}")
    if name in SWITCHES:
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: arrived as {short(repr(value))}. Give true or false: {HELP[name]}")
        return value
    if isinstance(value, bool | dict):
        raise ConfigError(f"{key}: arrived as {short(repr(value))}. Give the {HELP[name]}; quote what is text")
    if name == "schedule" and (hint := _as_number(value)):
        raise ConfigError(f"{key}: {hint}")
    if name == "schedule" and isinstance(value, int | float):
        quoted = 'write it in quotes, such as claa-schedule: "14:0.4"'
        raise ConfigError(f"{key}: {short(value)}: arrived as a number, which is no schedule: {quoted}")
    value = written(name, value)
    if isinstance(value, list) and len(value) != 1:  # SGLang hands one item on as that item
        raise ConfigError(f"{key}: arrived as the list {short(value)}. Give one value: the {HELP[name]}")
    return value


def _as_number(value: object) -> str:
    """What to say of a schedule, or a step, that arrived as a number; empty where it did not.

    SGLang hands on as text what YAML read as a number, and such a number is a layer times 60 and a rate. Any other
    number is a step without its rate, as it would be from a command line.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return ""
    if not math.isfinite(number):
        return ""
    layer, rate = divmod(number, 60)
    rate = round(rate, 9)
    if not (0 < rate <= 1 and 0 <= layer <= 9999):
        return ""
    step = f"{int(layer)}:{rate:g}"
    return (
        f"{short(value)}: arrived as a number, which is no schedule. YAML reads {step} without quotes as {int(layer)} "
        f'times 60 plus {rate:g}: write it in quotes, claa-schedule: "{step}"'
    )


def _last_layers(count: int, prune_layer: int) -> tuple[int, ...]:
    return tuple(range(prune_layer - count + 1, prune_layer + 1))


def _parse_score_layers(text: object, prune_layer: int) -> tuple[int, ...]:
    """Parse `4` as a count, `8,12` and `14,` as lists; lists are checked against the prune layer later."""
    problem = ConfigError(f"--claa-score-layers {text!r}: give the {HELP['score_layers']}")
    if not isinstance(text, str):
        raise problem
    parts = [part.strip() for part in text.split(",")]
    is_list = len(parts) > 1
    if is_list and parts[-1] == "":
        parts.pop()
    if not all(part.isascii() and part.isdigit() and len(part) <= 4 for part in parts):
        raise problem
    numbers = tuple(int(part) for part in parts)
    if is_list:
        return numbers
    if not 1 <= numbers[0] <= prune_layer + 1:
        raise ConfigError(
            f"--claa-score-layers {text}: a count must be 1 to {prune_layer + 1}, for the last layers up to "
            f"the prune layer {prune_layer}; layer {numbers[0]} alone is written {numbers[0]},"
        )
    return _last_layers(numbers[0], prune_layer)


def _parse_schedule(flags: ClaaFlags) -> list[dict[str, Any]]:
    """Parse `14:0.4,20:0.15:18+20`, each step as the fields of a PruneStep; ranges are checked later."""
    for name in ("prune_layer", "keep_rate", "score_layers"):
        if getattr(flags, name) is not None:
            raise ConfigError(
                f"--claa-schedule {flags.schedule!r} and {_flag(name)} {getattr(flags, name)!r}: a schedule says where "
                f"to prune, by which layers and how much. Leave out {_flag(name)}, or --claa-schedule"
            )
    if hint := _as_number(flags.schedule):
        raise ConfigError(f"--claa-schedule {hint}")
    if not isinstance(flags.schedule, str) or len(flags.schedule) > MAX_QUOTED:
        raise ConfigError(f"--claa-schedule {short(repr(flags.schedule))}: give the {HELP['schedule']}")
    steps: list[dict[str, Any]] = []
    previous = -1
    for text in flags.schedule.split(","):
        if (match := _STEP.fullmatch(text.strip())) is None:
            raise ConfigError(
                f"--claa-schedule {short(repr(flags.schedule))}: {short(repr(text))} is no step. Give the "
                f"{HELP['schedule']}"
            )
        prune, scored = int(match["layer"]), match["scored"]
        if scored is None:
            layers = _last_layers(max(1, min(DEFAULT_SCORED, prune - previous)), prune)
        else:
            layers = tuple(int(layer) for layer in scored.split("+"))
        steps.append({"prune_layer": prune, "keep_rate": float(match["rate"]), "score_layers": layers})
        previous = prune
    return steps
