"""Which model a profile was made for: the architecture, field by field, so that a refusal can say what differs.

Host-side only: no torch, no SGLang. SGLang and transformers read the same config.json, so both sides describe a model
from the same dictionary. Weights are not looked at here: a server checks its configuration before it loads any. Another
fine-tune of the same architecture is accepted; `profile_weights.py` tells it from the one that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]


class ProfileModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The model of a profile. `calibrate` states every field; a field left out, as by hand, is not compared.

    num_layers: required, as layers mean nothing in a model of another depth. name: for people, never compared.
    architecture: class of the model, such as LlamaForCausalLM. The others as in config.json.
    """

    num_layers: Annotated[int, Meta(ge=2, le=10_000)]
    name: str = ""
    architecture: str = ""
    hidden_size: Size | UnsetType = UNSET
    heads: Size | UnsetType = UNSET
    kv_heads: Size | UnsetType = UNSET
    vocabulary: Size | UnsetType = UNSET


# field of ProfileModel -> key of config.json and what a person calls it
_SIZES = {
    "hidden_size": ("hidden_size", "hidden size"),
    "heads": ("num_attention_heads", "attention heads"),
    "kv_heads": ("num_key_value_heads", "KV heads"),
    "vocabulary": ("vocab_size", "tokens of vocabulary"),
}


def describe(config: Mapping[str, Any], num_layers: int, name: str = "") -> ProfileModel:
    """The model of a Hugging Face configuration (`PretrainedConfig.to_dict()`), of `num_layers` decoder layers.

    The text model of a configuration with several (`text_config`). A size that it does not give is left out, but for KV
    heads, which are then as many as heads. Never raises.
    """
    text = config.get("text_config") or config
    sizes = {field: text.get(key) for field, (key, _) in _SIZES.items()}
    sizes["kv_heads"] = sizes["kv_heads"] or sizes["heads"]
    return ProfileModel(
        num_layers=num_layers,
        name=name,
        architecture=(config.get("architectures") or [""])[0],
        **{field: size for field, size in sizes.items() if size is not None},
    )


def difference(made_for: ProfileModel, served: ProfileModel) -> str:
    """How the served model differs from what the profile states; empty if in nothing."""
    differences = []
    if made_for.architecture and made_for.architecture != served.architecture:
        differences.append(
            f"{made_for.architecture}, this model is {served.architecture or 'of no named architecture'}"
        )
    for field, (_, what) in _SIZES.items():
        stated, found = getattr(made_for, field), getattr(served, field)
        if stated is not UNSET and stated != found:
            differences.append(f"{stated:,} {what}, this model has {'none' if found is UNSET else f'{found:,}'}")
    return "; ".join(differences)


def is_whole(model: ProfileModel) -> bool:
    """Whether a profile states every field that is compared, so that no difference means the same architecture."""
    return bool(model.architecture) and all(getattr(model, field) is not UNSET for field in _SIZES)
