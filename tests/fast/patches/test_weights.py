"""What of a server's weights is compared with a profile's: as SGLang keeps them, fused and padded.

Parameters are those of a real model, laid out as SGLang's modules have them; tests/engine/test_families.py holds the
same against SGLang itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.runtime_context import get_parallel

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.config.profile_choice import Choice
from claa_sglang.config.profile_weights import of_checkpoint
from claa_sglang.patches.weights import samples, say_profile
from claa_sglang.start.server_config import KEPT
from tests import tiny_models
from tests.tiny_models import NUM_LAYERS, SHAPE, VOCAB_SIZE

STEP = PruneStep(prune_layer=3, keep_rate=0.2, score_layers=(2, 3))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    path = tiny_models.build("llama", tmp_path_factory.mktemp("llama"))
    return AutoModelForCausalLM.from_pretrained(path)


@pytest.fixture
def runner(checkpoint: Any) -> Any:
    """A model with the checkpoint's parameters: queries, keys and values fused, 24 rows of padding in the embedding."""
    model = torch.nn.Module()
    for name, weight in checkpoint.state_dict().items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        if name.endswith("q_proj.weight"):
            parts = [checkpoint.state_dict()[name.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            name, weight = name.replace("q_proj", "qkv_proj"), torch.cat(parts)
        if name == "model.embed_tokens.weight":
            weight = torch.cat([weight, torch.zeros(24, weight.shape[1])])
        module = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(weight.clone()))
    head_dim = SHAPE.get("head_dim") or SHAPE["hidden_size"] // SHAPE["num_attention_heads"]
    heads = SHAPE["num_attention_heads"]
    return SimpleNamespace(
        model=model,
        model_config=SimpleNamespace(
            vocab_size=VOCAB_SIZE, num_attention_heads=heads, head_dim=head_dim, num_hidden_layers=NUM_LAYERS
        ),
        server_args=SimpleNamespace(tp_size=1, load_format="auto", model_path="org/tiny"),
    )


def test_fused_and_padded_weights_are_those_of_the_checkpoint(checkpoint: Any, runner: Any) -> None:
    assert samples(runner) == of_checkpoint(checkpoint)
    runner.model.bfloat16()
    assert samples(runner) == of_checkpoint(checkpoint)


def _quantise(runner: Any) -> None:
    for layer in runner.model.model.layers.children():
        del layer.mlp.down_proj.weight
        layer.self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)


def _pack(runner: Any) -> None:
    runner.model.model.embed_tokens.use_intel_amx_backend = True


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (_quantise, {"embedding", "q"}),
        (_pack, {"q", "o", "down"}),
        (lambda runner: runner.model.half(), set()),
        (lambda runner: setattr(runner.server_args, "tp_size", 2), set()),
        (lambda runner: setattr(runner.server_args, "load_format", "dummy"), set()),
    ],
    ids=["quantised", "packed", "float16", "sharded", "random"],
)
def test_what_is_not_as_in_the_checkpoint_is_not_compared(
    runner: Any, checkpoint: Any, change: Callable[[Any], None], left: set[str]
) -> None:
    known = of_checkpoint(checkpoint)
    change(runner)
    assert samples(runner) == {what: known[what] for what in left}


@pytest.mark.parametrize(
    ("weights", "level", "says"),
    [
        ("own", "INFO", "measured on these weights"),
        ("another", "WARNING", "was measured on other weights than the loaded ones (embedding, down differ)"),
        ("unknown kinds", "INFO", "the loaded weights cannot be compared"),
        (None, "INFO", "it does not say on which weights it was measured"),
    ],
)
def test_one_line_says_which_profile_runs_and_whether_it_is_of_these_weights(
    runner: Any, checkpoint: Any, caplog: pytest.LogCaptureFixture, weights: str | None, level: str, says: str
) -> None:
    own = of_checkpoint(checkpoint)
    stated = {"own": own, "another": {**own, "embedding": "0", "down": "1"}, "unknown kinds": {"gate": "2"}}
    config = ClaaConfig(steps=(STEP,), num_layers=NUM_LAYERS, profile="/p/x.json", profile_origin="auto: shipped")
    setattr(runner.server_args, KEPT, Choice(config, stated.get(weights) if weights else None, ()))
    with caplog.at_level(logging.INFO), get_parallel().override(tp_rank=0, dp_rank=1):
        say_profile(runner)
    assert not caplog.records, "of several replicas the first one says it"
    with caplog.at_level(logging.INFO), get_parallel().override(tp_rank=0, dp_rank=None):
        say_profile(runner)
    (record,) = caplog.records
    text = record.getMessage()
    assert record.levelname == level and "claa-sglang: profile /p/x.json (auto: shipped)" in text and says in text
    assert ("claa-sglang calibrate --model org/tiny" in text) == (level == "WARNING")
    assert ("keep 0.2 after layer 3 (ranked by 2,3)" in text) == (level == "INFO")
