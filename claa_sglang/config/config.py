"""The one configuration of CLAA, a frozen record, the same in every process.

Host-side only: no torch, no SGLang. Types and ranges are msgspec constraints (checked by `msgspec.convert`,
never by a constructor); what holds between values is checked in `ClaaConfig.__post_init__`, so however a
configuration came to be, it is consistent. Every refusal is a ConfigError that names the flag, the value, the
range and a remedy. flags.py makes it of what an operator typed, profile_file.py reads a profile.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from claa_sglang.ranking import spec

KeepRate = Annotated[float, Meta(gt=0, le=1)]
Layer = Annotated[int, Meta(ge=0, le=9999)]
Layers = Annotated[tuple[Layer, ...], Meta(min_length=1)]
Window = Annotated[int, Meta(ge=1, le=1024)]
PoolKernel = Annotated[int, Meta(ge=1, le=1023)]
ShadowRate = Annotated[float, Meta(ge=0, le=1)]
PromptTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]

ModeName = Literal["prune", "observe"]
PolicyName = Literal["auto", "always"]
FinishName = Literal["idle", "off"]
ScorerName = Literal["auto", "triton", "flashinfer", "torch"]
ChunkTokens = Annotated[int, Meta(ge=1, le=2**31 - 1)]

MIN_RATE = 1e-300  # later rates that follow the first one's are not smaller
MAX_QUOTED = 400  # characters of a profile or a flag that an error quotes


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
    mode: whether prompts are pruned, or only ranked, as a report says, and computed as stock does.
    policy: whether a prompt is pruned only where that is expected to be faster.
    ranker: as `spec.parse` reads it. scorer: what computes its scores; auto measures at start which is faster.
    finish: whether pruned prefixes are made dense while the server is idle. finish_chunk: tokens of a step of that, at
    most; None for what adds about `finishing.step_size.SECONDS` to launching.
    decode_dense_layers: first layers in which generated tokens read the whole prompt; None for all of them.
    allow_explain: whether requests may have scores of their tokens in their reports.
    shadow_rate: share of the pruned requests that are answered dense as well, while the server is idle.
    profile: the file the values came from, where there is one. profile_origin: how it was found, or why there is none.
    """

    steps: Annotated[tuple[PruneStep, ...], Meta(min_length=1)]
    num_layers: Annotated[int, Meta(ge=2)]
    window: Window = 32
    pool_kernel: PoolKernel = 7
    min_prompt_tokens: PromptTokens = 1024
    mode: ModeName = "prune"
    policy: PolicyName = "auto"
    ranker: str = "claa"
    scorer: ScorerName = "auto"
    finish: FinishName = "idle"
    finish_chunk: ChunkTokens | None = None
    decode_dense_layers: Layer | None = None
    allow_explain: bool = False
    shadow_rate: ShadowRate = 0.0
    profile: str | None = None
    profile_origin: str = ""

    def __post_init__(self) -> None:
        if self.pool_kernel % 2 == 0:
            odd = self.pool_kernel - 1
            raise ConfigError(f"--claa-pool-kernel {self.pool_kernel}: must be odd; give {odd}")
        try:
            spec.parse(self.ranker)
        except spec.RankerError as error:
            raise ConfigError(f"--claa-ranker: {error}") from error
        previous: PruneStep | None = None
        for step in self.steps:
            _check_step(step, previous, self.num_layers)
            previous = step
        if self.mode == "observe" and len(self.steps) > 1:
            raise ConfigError(
                "--claa-mode observe: what a second prune keeps is ranked by layers that saw what the first one kept. "
                "Give one prune, such as with --claa-profile none, or leave out --claa-mode"
            )
        if self.mode == "observe" and self.shadow_rate:
            raise ConfigError(
                f"--claa-shadow-rate {self.shadow_rate:g}: --claa-mode observe prunes nothing, so there is no pruned "
                "answer to compare. Leave out --claa-shadow-rate, or --claa-mode"
            )

    @property
    def observes(self) -> bool:
        """Whether nothing is dropped: what would be kept is reported."""
        return self.mode == "observe"

    @property
    def kept_layers(self) -> range:
        """Layers up to the first prune in which generated tokens read, of the prompt, what was kept; may be empty."""
        end = self.steps[0].prune_layer + 1
        return range(end if self.decode_dense_layers is None else min(self.decode_dense_layers, end), end)

    @property
    def row_kinds(self) -> int:
        """Rows of the request table that a pruned request has beside its stock row."""
        return len(self.steps) + bool(self.kept_layers)

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


def _check_step(step: PruneStep, previous: PruneStep | None, num_layers: int) -> None:
    """What must hold between the values of one step and of the step before it. Raises ConfigError."""
    prune, scored = step.prune_layer, step.score_layers
    if not 0 <= prune <= num_layers - 2:
        raise ConfigError(
            f"--claa-prune-layer {prune}: must be 0 to {num_layers - 2}, as the model has {num_layers} "
            f"layers (default {num_layers // 2 - 1})"
        )
    if list(scored) != sorted(set(scored)):
        ordered = listed(sorted(set(scored)))
        raise ConfigError(f"--claa-score-layers {listed(scored)}: must ascend, each layer once; write {ordered}")
    if not scored or scored[0] < 0 or scored[-1] > prune:
        raise ConfigError(
            f"--claa-score-layers {listed(scored)}: must be layers 0 to {prune}, the prune layer. Give "
            "--claa-score-layers that fit, or a later --claa-prune-layer"
        )
    if previous is None:
        return
    if prune <= previous.prune_layer or scored[0] <= previous.prune_layer:
        raise ConfigError(
            f"prune step at layer {prune}, scored layers {listed(scored)}: both must lie above the previous "
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


def short(text: object) -> str:
    """`text` on one line of bounded length, as it can be printed: an error may quote much of a file."""
    line = str(text)
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line[:MAX_QUOTED])
    return shown if len(line) <= MAX_QUOTED else f"{shown} [cut]"


def listed(layers: tuple[int, ...] | list[int]) -> str:
    return short(",".join(map(str, layers)) + ("," if len(layers) == 1 else ""))
