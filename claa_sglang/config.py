"""The one configuration of CLAA: operator flags and an optional profile file become one frozen record.

Host-side only: no torch, no SGLang. Types and ranges are msgspec constraints (checked by `msgspec.convert`,
never by a constructor); what holds between values is checked in `ClaaConfig.__post_init__`, so however a
configuration came to be, it is consistent. Every refusal is a ConfigError that names the flag, the value, the
range and a remedy.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from claa_sglang import ranker_spec
from claa_sglang.profile_model import ProfileModel, difference

KeepRate = Annotated[float, Meta(gt=0, le=1)]
Layer = Annotated[int, Meta(ge=0, le=9999)]
Layers = Annotated[tuple[Layer, ...], Meta(min_length=1)]
Window = Annotated[int, Meta(ge=1, le=1024)]
PoolKernel = Annotated[int, Meta(ge=1, le=1023)]
PromptTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]

PolicyName = Literal["auto", "always"]

DEFAULT_KEEP_RATE = 0.2
DEFAULT_SCORED = 4  # layers, the last ones up to the prune layer
MIN_RATE = 1e-300  # a profile's later rates are not scaled below it
MAX_PROFILE_BYTES = 1 << 20  # a profile has about a thousand; more is another kind of file
MAX_QUOTED = 400  # characters of a profile or a flag that an error quotes
# One step of a schedule: layer:rate, or layer:rate:scored+scored.
_STEP = re.compile(
    r"(?P<layer>\d{1,4}):(?P<rate>\d{0,20}\.?\d{1,20}(e-?\d{1,3})?)(:(?P<scored>\d{1,4}(\+\d{1,4})*))?", re.ASCII
)

# field of ClaaFlags -> what may be written, with unit, range and default; --help and the errors share it.
HELP: dict[str, str] = {
    "keep_rate": "share of the prompt tokens that go on to the late layers: above 0, at most 1 (default 0.2)",
    "prune_layer": "layer after whose MLP tokens are dropped: 0 to L-2 of a model's L (default L//2 - 1)",
    "score_layers": (
        "layers whose attention ranks the tokens, none above the prune layer: a count n, such as 4, for the "
        "last n up to the prune layer, or an ascending list, such as 8,12,14,17; one layer alone is written "
        "with a comma, such as 14, (default 4, or fewer where the prune layer is below 3)"
    ),
    "schedule": (
        "prune steps, instead of one prune layer, keep rate and score layers: layer:rate for each step, such as "
        "14:0.4,20:0.15, layers ascending and rates (shares of the whole prompt) descending; layers that rank may "
        "follow, such as 14:0.4:12+14,20:0.15:18+20 (default the last 4 up to the prune layer, above the previous one)"
    ),
    "window": "prompt tokens at the end that score the others and are always kept: 1 to 1024 (default 8)",
    "pool_kernel": "tokens over which scores are averaged: odd, 1 to 1023 (default 7)",
    "ranker": f"what ranks the prompt tokens: {ranker_spec.HELP} (default claa)",
    "min_prompt_tokens": "prompts shorter than this many tokens run dense: 0 or more (default 1024)",
    "policy": (
        "auto prunes a prompt only where that is expected to be faster, given what is cached; always prunes every "
        "prompt that can be (default auto)"
    ),
    "profile": "JSON file with these values, as a calibration writes it; an explicit flag wins over it",
}


class ConfigError(ValueError):
    """The configuration cannot be used. The text names the flag, the value, the range and a remedy."""


class PruneStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One prune: after layer `prune_layer`'s MLP only `keep_rate` of the prompt tokens go on.

    score_layers: ascending and unique, none above prune_layer, all above the previous step's prune layer.
    """

    prune_layer: Layer
    keep_rate: KeepRate
    score_layers: Layers


class ClaaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything CLAA is told, for one model; made by `resolve`, the same in every process.

    steps: the prunes, prune layers ascending, keep rates (each a share of all prompt tokens) descending, or all 1.
    num_layers: decoder layers of the model. window, pool_kernel, min_prompt_tokens: in tokens.
    policy: whether a prompt is pruned only where that is expected to be faster.
    ranker: as `ranker_spec.parse` reads it.
    profile: the file the values came from, where one was given.
    """

    steps: Annotated[tuple[PruneStep, ...], Meta(min_length=1)]
    num_layers: Annotated[int, Meta(ge=2)]
    window: Window = 8
    pool_kernel: PoolKernel = 7
    min_prompt_tokens: PromptTokens = 1024
    policy: PolicyName = "auto"
    ranker: str = "claa"
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.pool_kernel % 2 == 0:
            odd = self.pool_kernel - 1
            raise ConfigError(f"--claa-pool-kernel {self.pool_kernel}: must be odd; give {odd}")
        try:
            ranker_spec.parse(self.ranker)
        except ranker_spec.RankerError as error:
            raise ConfigError(f"--claa-ranker: {error}") from error
        previous: PruneStep | None = None
        for step in self.steps:
            _check_step(step, previous, self.num_layers)
            previous = step

    @property
    def namespace(self) -> str:
        """Prefix-cache namespace of pruned requests.

        Late-layer rows of its nodes hold the boundary state after the first prune layer, which depends on
        nothing else: requests with other keep rates or windows share the prefix.
        """
        return f"claa:p{self.steps[0].prune_layer}"

    def with_keep_rate(self, rate: float) -> ClaaConfig:
        """This configuration with another keep rate in (0, 1] for the first step; later rates follow.

        A later rate becomes `rate ** (log(new first) / log(first))`: the configured first rate gives the configured
        later ones, 1 gives 1 everywhere (nothing is pruned), and all fall together in between. Steps that are all
        configured at 1 fall as one.

        Raises ConfigError for a rate outside the range.
        """
        if not 0 < rate <= 1:
            raise ConfigError(f"keep_rate {rate}: must be above 0 and at most 1")
        # Below this every prompt keeps its window alone; it leaves room for later rates to be smaller still.
        current = max(float(rate), 1e-9)
        configured = self.steps[0].keep_rate
        power = math.log(current) / math.log(configured) if configured < 1 else None
        steps = [msgspec.structs.replace(self.steps[0], keep_rate=current)]
        for step in self.steps[1:]:
            if current < 1:
                wanted = current if power is None else step.keep_rate**power
                # Rounding must not make two rates equal, or one 0: below 1 they descend, all above 0.
                current = min(max(wanted, MIN_RATE), math.nextafter(current, 0.0))
            steps.append(msgspec.structs.replace(step, keep_rate=current))
        return msgspec.structs.replace(self, steps=tuple(steps))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the namespace, for /server_info."""
        return {**msgspec.json.decode(msgspec.json.encode(self)), "namespace": self.namespace}


class ClaaFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator typed; None means not given. HELP says what each may be."""

    keep_rate: float | None = None
    prune_layer: int | None = None
    score_layers: str | None = None
    schedule: str | None = None
    window: int | None = None
    pool_kernel: int | None = None
    ranker: str | None = None
    min_prompt_tokens: int | None = None
    policy: str | None = None
    profile: str | None = None


class ProfileStep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One prune step of a profile; in the first step a value left out is the default."""

    prune_layer: Layer | UnsetType = UNSET
    keep_rate: KeepRate | UnsetType = UNSET
    score_layers: Layers | UnsetType = UNSET


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile file: values for one model, as a calibration writes them, and where they come from."""

    version: Literal[1]
    model: ProfileModel
    steps: tuple[ProfileStep, ...] = ()
    window: Window | UnsetType = UNSET
    pool_kernel: PoolKernel | UnsetType = UNSET
    min_prompt_tokens: PromptTokens | UnsetType = UNSET
    provenance: dict[str, str] = {}


def resolve(flags: ClaaFlags, num_layers: int, served: ProfileModel | None = None) -> ClaaConfig:
    """The configuration for a model of `num_layers` layers: explicit flags, then the profile, then defaults.

    served: the model, which a profile must have been made for; None where only its depth is known.

    A schedule gives all prune steps. Otherwise flags describe the first one, further ones come from a profile, and
    their rates follow an explicit keep rate (`with_keep_rate`). Raises ConfigError, and nothing else, for anything
    that cannot be used.
    """
    if num_layers < 2:
        raise ConfigError(f"--enable-claa: {num_layers} layer has no late layers; run the model without CLAA")
    profile = None if flags.profile is None else load_profile(flags.profile, num_layers, served)
    common = _given(profile, ("window", "pool_kernel", "min_prompt_tokens"))
    for name, kind in (("window", Window), ("pool_kernel", PoolKernel), ("min_prompt_tokens", PromptTokens)):
        if (value := getattr(flags, name)) is not None:
            common[name] = _checked(name, value, kind)
    if flags.policy is not None:
        common["policy"] = _checked("policy", flags.policy, PolicyName)
    if flags.ranker is not None:
        common["ranker"] = _checked("ranker", flags.ranker, str)

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
    raw = {"steps": steps, "num_layers": num_layers, "profile": flags.profile, **common}
    try:
        config = msgspec.convert(raw, ClaaConfig)
        if flags.keep_rate is not None:
            config = config.with_keep_rate(_checked("keep_rate", flags.keep_rate, KeepRate))
    except msgspec.ValidationError as error:
        raise ConfigError(f"{error} ({'; '.join(origins)})" if origins else str(error)) from error
    return config


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


def load_profile(path: str, num_layers: int, served: ProfileModel | None = None) -> Profile:
    """Read and validate a profile file for a model (see `resolve`). Raises ConfigError naming the file and remedy."""
    try:
        text = _read_file(path)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--claa-profile {path}: cannot be read: {_short(error)}. Give the path of a readable profile file"
        ) from error
    try:
        profile = msgspec.json.decode(text, type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(
            f"--claa-profile {path}: not a profile: {_short(error)}. Write it again (a calibration does), or give "
            "the values as flags without --claa-profile"
        ) from error
    if profile.model.num_layers != num_layers:
        raise ConfigError(
            f"--claa-profile {path}: made for a model of {profile.model.num_layers} layers"
            f"{f' ({_short(profile.model.name)})' if profile.model.name else ''}, this model has {num_layers}. "
            "Use the profile of this model, or none."
        )
    if served is not None and (differs := difference(profile.model, served)):
        name = f" ({_short(profile.model.name)})" if profile.model.name else ""
        raise ConfigError(
            f"--claa-profile {path}: made for another model{name}: {_short(differs)}. "
            "Use the profile of this model, or none. `claa-sglang calibrate` makes one."
        )
    return profile


def _read_file(path: str) -> bytes:
    """The bytes of a file of at most MAX_PROFILE_BYTES. Raises OSError, ValueError or TypeError, and never waits."""
    str(path).encode()  # /server_info shows it as JSON, which has no surrogates
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError("it is not a file")  # opening a pipe would wait for its writer
    with open(path, "rb") as file:
        content = file.read(MAX_PROFILE_BYTES + 1)
    if len(content) > MAX_PROFILE_BYTES:
        raise ValueError(f"it is larger than {MAX_PROFILE_BYTES:,} bytes, which no profile is")
    return content


def _check_step(step: PruneStep, previous: PruneStep | None, num_layers: int) -> None:
    """What must hold between the values of one step and of the step before it. Raises ConfigError."""
    prune, scored = step.prune_layer, step.score_layers
    if not 0 <= prune <= num_layers - 2:
        raise ConfigError(
            f"--claa-prune-layer {prune}: must be 0 to {num_layers - 2}, as the model has {num_layers} "
            f"layers (default {num_layers // 2 - 1})"
        )
    if list(scored) != sorted(set(scored)):
        ordered = _listed(sorted(set(scored)))
        raise ConfigError(f"--claa-score-layers {_listed(scored)}: must ascend, each layer once; write {ordered}")
    if not scored or scored[0] < 0 or scored[-1] > prune:
        raise ConfigError(
            f"--claa-score-layers {_listed(scored)}: must be layers 0 to {prune}, the prune layer. Give "
            "--claa-score-layers that fit, or a later --claa-prune-layer"
        )
    if previous is None:
        return
    if prune <= previous.prune_layer or scored[0] <= previous.prune_layer:
        raise ConfigError(
            f"prune step at layer {prune}, scored layers {_listed(scored)}: both must lie above the previous "
            f"step's prune layer {previous.prune_layer}. Correct the steps"
        )
    if step.keep_rate >= previous.keep_rate and not step.keep_rate == previous.keep_rate == 1:
        raise ConfigError(
            f"prune step at layer {prune}: keep_rate {step.keep_rate} must be below the previous step's "
            f"{previous.keep_rate} (both are shares of the whole prompt). Correct the steps"
        )
    if step.keep_rate < previous.keep_rate == 1:
        raise ConfigError(
            f"prune step at layer {previous.prune_layer}: keep_rate 1 drops nothing, and the step after it has "
            f"{step.keep_rate}. Leave out the step at layer {previous.prune_layer}, or give it a rate below 1"
        )


def _given(record: msgspec.Struct | None, names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the named values that a profile record gives."""
    values = {} if record is None else {name: getattr(record, name) for name in names}
    return {name: value for name, value in values.items() if value is not UNSET}


def _short(text: object) -> str:
    """`text` on one line of bounded length, as it can be printed: an error may quote much of a file."""
    line = str(text)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:MAX_QUOTED])
    return shown if len(line) <= MAX_QUOTED else f"{shown} [cut]"


def _flag(name: str) -> str:
    return "--claa-" + name.replace("_", "-")


def _checked(name: str, value: object, kind: Any) -> Any:
    """`value` if it has the type and range of `kind`; else ConfigError with the flag's own help."""
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:  # ValidationError, or UnicodeEncodeError for a lone surrogate
        raise ConfigError(f"{_flag(name)} {value!r}: {error}. Give the {HELP[name]}") from error


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
    if not isinstance(flags.schedule, str) or len(flags.schedule) > MAX_QUOTED:
        raise ConfigError(f"--claa-schedule {_short(repr(flags.schedule))}: give the {HELP['schedule']}")
    steps: list[dict[str, Any]] = []
    previous = -1
    for text in flags.schedule.split(","):
        if (match := _STEP.fullmatch(text.strip())) is None:
            raise ConfigError(
                f"--claa-schedule {_short(repr(flags.schedule))}: {_short(repr(text))} is no step. Give the "
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


def _listed(layers: tuple[int, ...] | list[int]) -> str:
    return _short(",".join(map(str, layers)) + ("," if len(layers) == 1 else ""))
