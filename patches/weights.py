"""Which profile a server runs, said once its weights are loaded, and whether it was measured on these weights.

The server's own process decides on the profile before it has a logger or weights; the first scheduler has both.
"""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.runtime_context import get_parallel

from claa_sglang.config import profile_weights
from claa_sglang.config.layer_warning import remedy
from claa_sglang.config.profile_weights import DTYPES, Samples
from claa_sglang.start.server_config import choice_of

logger = logging.getLogger(__name__)


def say_profile(runner: Any) -> None:
    """Log, in the first scheduler of a server, the profile of `runner`, a ModelRunner whose model is loaded.

    One line; a warning where the profile was measured on other weights, as of another fine-tune. Never raises.
    """
    args = runner.server_args
    if get_parallel().tp_rank or get_parallel().dp_rank:
        return
    choice = choice_of(args)
    config = choice.config
    if config.profile is None:
        logger.info("claa-sglang: no profile (%s); prunes: %s", config.profile_origin, _prunes(config))
        return
    about = f"claa-sglang: profile {config.profile} ({config.profile_origin})"
    differs = None if choice.weights is None else profile_weights.different(choice.weights, samples(runner))
    if differs:
        logger.warning(
            f"{about} was measured on other weights than the loaded ones ({', '.join(differs)} differ): another "
            "fine-tune, for which other layers and rates may be right, so answers can suffer. Measure this one with\n"
            f"{remedy(args.model_path)}"
        )
        return
    if choice.weights is None:
        compared = "it does not say on which weights it was measured"
    elif differs is None:
        compared = "the loaded weights cannot be compared with those it was measured on"
    else:
        compared = "measured on these weights"
    logger.info("%s: %s; prunes: %s", about, compared, _prunes(config))


def samples(runner: Any) -> Samples:
    """The hashes of the loaded weights (`profile_weights`); of none that is sharded, quantised, packed or invented."""
    model, shape = runner.model, runner.model_config
    if runner.server_args.tp_size > 1 or runner.server_args.load_format == "dummy":
        return {}
    parameters = dict(model.named_parameters())
    rows = {
        "embed_tokens": shape.vocab_size,  # after these it is padded
        "qkv_proj": shape.num_attention_heads * shape.head_dim,  # those of the queries come first
    }

    def parameter(name: str) -> Any:
        if name not in parameters:
            name = name.replace(".q_proj.", ".qkv_proj.")
        module, _, _ = name.rpartition(".")
        tensor = parameters.get(name)
        if tensor is None or str(tensor.dtype) not in DTYPES:
            return None
        if getattr(model.get_submodule(module), "use_intel_amx_backend", False):
            return None  # its values are in another order
        return tensor[: rows.get(module.rpartition(".")[2], len(tensor))]

    return profile_weights.sample(parameter, shape.num_hidden_layers)


def _prunes(config: Any) -> str:
    """`keep 0.3 after layer 21 (ranked by 21)`, a step each."""
    return ", ".join(
        f"keep {step.keep_rate:g} after layer {step.prune_layer} (ranked by {','.join(map(str, step.score_layers))})"
        for step in config.steps
    )
