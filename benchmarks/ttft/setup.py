"""What is served: the model, and the options of the engines that a run takes.

Engines, all of the same chunk size:

    again   with --control, a second stock engine: its ratio to stock is what processes differ by without a cause
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
from typing import Any, NamedTuple

import msgspec

from benchmarks import shapes
from benchmarks.engine import CPU_OPTIONS as CPU_ENGINE
from benchmarks.ttft import pauses
from benchmarks.ttft.bound import Depth
from benchmarks.ttft.settings import (
    CHAT_ANSWER,
    DECODE_TOKENS,
    DENSE_TOKENS,
    MIXED_SHORTS,
    OF_EVERY_ENGINE,
    QUESTION,
    SHORT,
    TURN_ANSWER,
    Settings,
)
from claa_sglang.tools import small_model

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
    def random(self) -> bool:
        """Whether its weights are."""
        return self.options.get("load_format") == "dummy"

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


def engine_options(
    model: Model, settings: Settings, chunk: int, scenarios: Iterable[str], gpu: bool
) -> dict[str, dict[str, Any]]:
    """Options of each engine that `scenarios` (names of catalogue.SCENARIOS, "rates" or "startup") need, by name.

    Engines are told how many tokens of KV to have, as each would otherwise take all memory that the others left. Raises
    ValueError for a prompt longer than the model's positions; a shape with random weights is given more of them.
    """
    demands = [demand(settings, name) for name in scenarios]
    overrides: dict[str, dict[str, Any]] = {
        "early": {"num_hidden_layers": model.depth.early},
        "late": {"num_hidden_layers": model.depth.late},
        "one": {"num_hidden_layers": 1},
    }
    longest, positions = max(need.longest for need in demands), model.config["max_position_embeddings"]
    more = {}
    if model.random and longest + SLACK > positions:
        more = {"max_position_embeddings": longest + SLACK}
    elif longest >= positions:
        raise ValueError(f"{model.name} has {positions} positions, too few for {longest} tokens: shorten the prompts")
    common = {**model.options, "chunked_prefill_size": chunk, "random_seed": 0, **(GPU_OPTIONS if gpu else CPU_OPTIONS)}
    common |= {name: value for name in OF_EVERY_ENGINE if (value := getattr(settings, name))}
    options = {}
    for name, tokens in kv_tokens(demands, max(settings.keep_rates)).items():
        page = settings.page_size or 1
        options[name] = {**common, "max_total_tokens": -(-tokens // page) * page}  # an engine takes whole pages
        if name == "claa":
            options[name] |= {"enable_claa": True, "claa_profile": "none", "claa_prune_layer": model.prune_layer}
            # Elsewhere a prefix that was finished between two requests would be another thing to measure.
            if settings.decode_dense_layers >= 0:
                options[name]["claa_decode_dense_layers"] = settings.decode_dense_layers
            options[name]["claa_finish"] = "idle" if any(need.finished for need in demands) else "off"
        if changed := {**overrides.get(name, {}), **more}:
            options[name]["json_model_override_args"] = json.dumps(changed)
    return options


# The size of the KV is given; a margin that each engine leaves would only be taken off what the others find.
GPU_OPTIONS = {"mem_fraction_static": 0.95}
CPU_OPTIONS = {
    **CPU_ENGINE,
    "max_running_requests": 32,
    "sleep_on_idle": True,  # an idle scheduler would spin and take a core from the one that is measured
}


class Demand(NamedTuple):
    """What a scenario takes: its longest prompt, tokens of KV in a stock engine, longest prompt with a bound; or 0.

    finished: tokens of prefixes that are there twice while they are finished, pruned and dense.
    """

    longest: int
    tokens: int
    bounded: int = 0
    finished: int = 0


def demand(settings: Settings, scenario: str) -> Demand:
    """What `scenario` takes. Raises KeyError for a name that is none."""
    prefix, burst = max(settings.prefix_lengths), max(settings.burst_lengths)
    cold, mixed, chat = max(settings.lengths), max(settings.mixed_lengths), settings.chat
    second = prefix + TURN_ANSWER + QUESTION
    paused, user = max(settings.pause_lengths), max(settings.users_lengths)
    shared = user + pauses.QUESTIONS * (TURN_ANSWER + QUESTION)
    decoding = [(b, n) for n in settings.decode_lengths for b in settings.batches(n)] or [(0, 0)]
    return {
        "cold": Demand(cold, cold, cold),
        "dense": Demand(max(settings.dense_lengths), max(settings.dense_lengths) + DENSE_TOKENS),
        "second-turn": Demand(second, second, prefix),
        "shared-prefix": Demand(prefix, 2 * prefix),
        "burst": Demand(burst, burst * max(settings.concurrency)),
        "mixed": Demand(mixed, mixed + MIXED_SHORTS * SHORT),
        "growing-chat": Demand(chat.last, chat.last + chat.turns * CHAT_ANSWER),
        "decode": Demand(max(length for _, length in decoding), max(b * (n + 2 * DECODE_TOKENS) for b, n in decoding)),
        "after-pause": Demand(paused + TURN_ANSWER + QUESTION, paused + TURN_ANSWER + QUESTION, finished=paused),
        "thinking-chat": Demand(chat.last, chat.last + chat.turns * CHAT_ANSWER, finished=chat.last),
        "pasting-chat": Demand(chat.last, chat.last + chat.turns * CHAT_ANSWER, finished=chat.last),
        "users": Demand(shared, pauses.USERS * shared, finished=pauses.USERS * shared),
        "arrivals": Demand(settings.rate_tokens, 16 * settings.rate_tokens, finished=settings.rate_tokens),
        # Requests queue when this is full, in both servers alike.
        "rates": Demand(settings.rate_tokens, 16 * settings.rate_tokens),
        "startup": Demand(0, 0),
    }[scenario]


def kv_tokens(demands: Iterable[Demand], keep_rate: float) -> dict[str, int]:
    """Tokens of KV of each engine that is needed, by its name. keep_rate: the highest."""
    demands = list(demands)
    tokens, bounded = max(need.tokens for need in demands), max(need.bounded for need in demands)
    # A pruned request has a late slot for every kept token, beside the slots of its prompt.
    twice = max(need.finished for need in demands)
    engines = {"stock": tokens + SLACK, "claa": int((1 + keep_rate) * tokens) + twice + SLACK}
    if bounded:
        kept = int(keep_rate * bounded) + SLACK
        engines |= {"early": bounded + SLACK, "late": kept, "one": bounded + SLACK}
    return engines
