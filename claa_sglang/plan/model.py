"""What of a model's config.json decides how long a prefill takes and how much its KV does. Weights are not read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from claa_sglang.config.config import short
from claa_sglang.plan.error import PlanError
from claa_sglang.policy.rates import Layer

FILE = "config.json"
# Decoder layers of these are attention with per-head keys and a gated MLP, one after the other, all alike.
FAMILIES = (
    *("GemmaForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MistralForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
)


class Shape(NamedTuple):
    """A model. heads, kv_heads: of a layer. head_dim: elements of each. mlp: inner width. context: tokens it takes.
    tied: whether the output matrix is the embedding."""

    name: str
    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    context: int
    tied: bool

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices; norms and biases are small."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.mlp

    @property
    def weights(self) -> int:
        """Elements of all matrices."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocabulary * self.hidden

    @property
    def kv_width(self) -> int:
        """Elements of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim

    def layer(self, itemsize: int) -> Layer:
        """One layer, as the cost model wants it. itemsize: bytes of an element."""
        return Layer(self.layer_weights, self.heads * self.head_dim, itemsize)


def read(path: Path) -> Shape:
    """The model of a directory with a config.json, or of such a file.

    Raises PlanError: there is none, it is damaged, or it is of a model whose layers are not what is reckoned with.
    """
    file = path / FILE if path.is_dir() else path
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise PlanError(
            f"--model {short(path)}: there is no {FILE}. Give a model's directory, or its {FILE}: of a model on the "
            "hub, `hf download MODEL config.json` prints where it is"
        ) from None
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--model {short(path)}: {short(file)} cannot be read ({short(error)}). Give a model's {FILE}"
        ) from error
    if not isinstance(config, dict):
        raise PlanError(f"--model {short(path)}: {short(file)} is no JSON object. Give a model's {FILE}")
    return shape_of(config, name=file.resolve().parent.name)


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The model of a configuration. Raises PlanError."""
    family = _family(config)
    _check(config, family)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    return Shape(
        name=name,
        family=family,
        layers=_size(config, "num_hidden_layers", at_least=2),
        hidden=hidden,
        heads=heads,
        kv_heads=heads if config.get("num_key_value_heads") is None else _size(config, "num_key_value_heads"),
        head_dim=hidden // heads if config.get("head_dim") is None else _size(config, "head_dim"),
        mlp=_size(config, "intermediate_size"),
        vocabulary=_size(config, "vocab_size"),
        context=_size(config, "max_position_embeddings"),
        tied=bool(config.get("tie_word_embeddings", family == "GemmaForCausalLM")),
    )


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    family = named[0] if isinstance(named, list) and named else None
    if family not in FAMILIES:
        raise PlanError(
            f"{FILE} is of {short(family or 'no named architecture')}, and a plan is made for {', '.join(FAMILIES)}. "
            "Measure another model with benchmarks/bench_ttft.py"
        )
    return str(family)


def _check(config: Mapping[str, Any], family: str) -> None:
    windows = config.get("sliding_window") and config.get("use_sliding_window", family == "MistralForCausalLM")
    kinds = config.get("layer_types") or ()
    if windows or "sliding_attention" in kinds or "chunked_attention" in kinds:
        raise PlanError(
            f"{FILE} has sliding-window layers, which --enable-claa refuses. Plan a model of full attention"
        )
    if config.get("quantization_config"):
        raise PlanError(
            f"{FILE} has a quantization_config, and time and memory of quantised weights are not known here. Plan with "
            "the config.json of the model in 16 bits"
        )


def _size(config: Mapping[str, Any], key: str, at_least: int = 1) -> int:
    value = config.get(key)
    if type(value) is not int or not at_least <= value < 2**31:
        raise PlanError(f"{FILE}: {key} is {short(value)}, not a number from {at_least} up. Give an unedited {FILE}")
    return value
