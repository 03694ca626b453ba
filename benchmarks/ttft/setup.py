"""What is served: the model, and the options of the engines that a run takes.

Engines, all of the same chunk size:

    stock   SGLang as it starts by itself: no attention backend is named, so it takes its best; graphs as they come
    claa    the same with --enable-claa; keep rates and policies are per request
    early   the first p + 1 layers of the model, stock: early(N) of the bound
    late    as many layers as are late, stock: late(kN); the same engine as `early` when the two counts are equal
    one     one layer, stock: what a request pays once
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import shapes
from benchmarks.ttft.bound import Depth
from benchmarks.ttft.settings import CHAT_ANSWER, DECODE_TOKENS, MIXED_SHORTS, QUESTION, SHORT, Settings
from claa_sglang import small_model

ROOT = Path(__file__).resolve().parents[2]
SLACK = 4096  # tokens of KV beyond what a scenario needs: generated tokens, pages, the reservation of running requests
POOL_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Model(msgspec.Struct, frozen=True):
    """What is served. name: for tables. config: its config.json. options: engine options that name it."""

    name: str
    config: dict[str, Any]
    options: dict[str, Any]
    itemsize: int
    prune_layer: int

    @property
    def depth(self) -> Depth:
        return Depth(self.config["num_hidden_layers"], self.prune_layer)


def open_model(path: Path | None, shape: str | None, prune_layer: int | None, gpu: bool, stack: ExitStack) -> Model:
    """The model in directory `path`, or a shape with random weights, or SmolLM2 when neither is named.

    A shape lives in a temporary directory until `stack` closes. On the CPU engine everything is float32.
    """
    options: dict[str, Any] = {"skip_tokenizer_init": True}
    if shape is None:
        path = path or small_model.prepare(ROOT / small_model.DEFAULT_DIR)
    else:
        path = shapes.write(shape, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="claa-shape-"))))
        options |= shapes.RANDOM_WEIGHTS
    config = json.loads((path / "config.json").read_text())
    dtype = "float32" if not gpu else config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    options |= {"model_path": str(path), "dtype": dtype}
    prune_layer = config["num_hidden_layers"] // 2 - 1 if prune_layer is None else prune_layer
    return Model(shape or path.name, config, options, POOL_DTYPE_BYTES[dtype], prune_layer)


def engine_options(model: Model, settings: Settings, chunk: int, needs: dict[str, int], gpu: bool) -> dict[str, Any]:
    """Options of each engine that `needs` names, which maps it to the tokens of KV it must hold.

    Engines are told their KV size, as each would otherwise take what memory the others left.
    """
    common = {**model.options, "chunked_prefill_size": chunk, "random_seed": 0}
    # Near all memory: the KV size is given, and a margin of each engine's own would be taken off the others' as well.
    common |= {"mem_fraction_static": 0.95} if gpu else CPU_OPTIONS
    longest = max(needs.values())
    depth = model.depth
    own = {
        "stock": {},
        "claa": {"enable_claa": True, "claa_prune_layer": model.prune_layer},
        "early": {"num_hidden_layers": depth.early},
        "late": {"num_hidden_layers": depth.late},
        "one": {"num_hidden_layers": 1},
    }
    result = {}
    for name, tokens in needs.items():
        overrides = own[name] if name not in ("stock", "claa") else {}
        flags = own[name] if name in ("stock", "claa") else {}
        if model.options.get("load_format") == "dummy" and longest > model.config["max_position_embeddings"]:
            # As many tokens as the shape has positions leave none for an answer. Random weights do not mind more.
            overrides = {**overrides, "max_position_embeddings": longest}
        result[name] = {**common, "max_total_tokens": tokens, **flags}
        if overrides:
            result[name]["json_model_override_args"] = json.dumps(overrides)
    return result


CPU_OPTIONS = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "mem_fraction_static": 0.4,
    "max_running_requests": 32,
    "sleep_on_idle": True,  # an idle scheduler would spin and take a core from the one that is measured
}


def kv_needs(settings: Settings, scenarios: Iterable[str]) -> dict[str, int]:
    """Tokens of KV that each engine must hold for `scenarios` (names of scenarios.SCENARIOS), by engine."""
    stock = [0]
    bounded = [0]  # prompts whose bound is measured
    for name in scenarios:
        match name:
            case "cold":
                stock += settings.lengths
                bounded += settings.lengths
            case "dense":
                stock += settings.dense_lengths
            case "shared-prefix" | "second-turn":
                stock += [3 * n // 2 + QUESTION for n in settings.prefix_lengths]
                bounded += settings.prefix_lengths if name == "second-turn" else []
            case "growing-chat":
                stock.append(settings.chat.last + settings.chat.turns * CHAT_ANSWER)
            case "mixed":
                stock += [n + MIXED_SHORTS * SHORT for n in settings.mixed_lengths]
            case "decode":
                stock += [settings.decode_batch * (n + 2 * DECODE_TOKENS) for n in settings.decode_lengths]
            case "burst":
                stock += [n * c for n in settings.burst_lengths for c in settings.concurrency]
            case "rates":
                # Requests queue when this is full, in both servers alike.
                stock.append(16 * settings.rate_tokens)
    keep = max(settings.keep_rates)
    needs = {"stock": max(stock) + SLACK, "claa": int(max(stock) * (1 + keep)) + SLACK}
    if max(bounded):
        needs["early"] = max(bounded) + SLACK
        needs["late"] = needs["one"] = int(keep * max(bounded)) + SLACK
    return needs
