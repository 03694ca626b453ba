"""Which weights a profile was measured on: short hashes that a calibration and a server can both compute.

Parameters go by their names in the checkpoint. A server fuses some of them, casts them, or packs them for its device,
so only what has the checkpoint's values in the checkpoint's order is sampled, and only in bfloat16, which float32 and
bfloat16 loads of one checkpoint agree on. Where a server has no such parameter, nothing is said of it.

Tensors are only asked for what they can do, so nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

KEY = "weights in bfloat16"  # of a profile's provenance
SAMPLED = 64  # values of each parameter
DTYPES = ("torch.float32", "torch.bfloat16")  # in which a parameter can be compared

# What is sampled: of the whole model, and of its first, middle and last layer.
# Not of norms: SGLang 0.5.23 loads gemma's with 1 added.
_WHOLE = {"embedding": "model.embed_tokens.weight"}
_OF_A_LAYER = {"q": "self_attn.q_proj.weight", "o": "self_attn.o_proj.weight", "down": "mlp.down_proj.weight"}
Samples = dict[str, str]  # what was sampled -> 16 hexadecimal digits


def sample(parameter: Callable[[str], Any], num_layers: int) -> Samples:
    """The hashes of a model of `num_layers` layers; empty if none of its parameters can be compared.

    parameter: the tensor of a name, as the checkpoint has it, of a dtype in DTYPES; None where there is none such.
    """
    layers = sorted({0, num_layers // 2, num_layers - 1})
    names = {what: [name] for what, name in _WHOLE.items()}
    names |= {what: [f"model.layers.{i}.{name}" for i in layers] for what, name in _OF_A_LAYER.items()}
    found = {}
    for what, wanted in names.items():
        tensors = [parameter(name) for name in wanted]
        if all(tensor is not None for tensor in tensors):
            found[what] = _digest(tensors)
    return found


def of_checkpoint(model: Any) -> Samples:
    """The hashes of a loaded transformers model; empty if its dtype is none of DTYPES."""
    parameters = dict(model.named_parameters())
    config = model.config.get_text_config()

    def parameter(name: str) -> Any:
        tensor = parameters.get(name)
        if tensor is None or str(tensor.dtype) not in DTYPES:
            return None
        return tensor[: config.vocab_size] if name == _WHOLE["embedding"] else tensor

    return sample(parameter, config.num_hidden_layers)


def written(samples: Samples) -> str:
    """As provenance has it: `embedding 0123456789abcdef, q …`."""
    return ", ".join(f"{what} {digest}" for what, digest in samples.items())


def stated(provenance: Mapping[str, str]) -> Samples | None:
    """What a profile's provenance states; None where it states nothing that can be read."""
    found = re.findall(r"([a-z ]+?) ([0-9a-f]{16})(?:, |$)", provenance.get(KEY, ""))
    return {what.strip(): digest for what, digest in found} or None


def different(profile: Samples, served: Samples) -> list[str] | None:
    """Names of what differs between the two; None if they have nothing in common to compare."""
    common = [what for what in profile if what in served]
    return [what for what in common if profile[what] != served[what]] if common else None


def _digest(tensors: list[Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        last = flat.numel() - 1
        # Evenly from the first value to the last: steps of a whole row would sample one column alone.
        values = flat[[i * last // (SAMPLED - 1) for i in range(SAMPLED)]].bfloat16().float().tolist()
        digest.update(f"{tuple(tensor.shape)} ".encode() + struct.pack(f"<{SAMPLED}f", *values))
    return digest.hexdigest()[:16]
