"""The same arrivals on stock and on the plugin with its default policy: how many prompt tokens each computes.

Counted by SGLang's own scheduler, in the log of its prefill steps, so the request that SGLang sends before the samples
of a request counts as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import tiny_model
from tests.answers import ONE_THREAD, STRICT
from tests.engine_server import Server, server

pytestmark = pytest.mark.engine

WINDOW = 32
FEW = {"max_new_tokens": 2, "ignore_eos": True}
KEEP = {"custom_params": {"claa": {"keep_rate": 0.4}}}


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(100, 40_000, length).tolist()


def samples(s: Server) -> int:
    s.generate(input_ids=ids(1500, 1), sampling_params={**FEW, "n": 8, "temperature": 0.8})
    return 8


def one_then_equal_ones(s: Server) -> int:
    s.generate(input_ids=ids(400, 4), sampling_params=FEW)
    s.generate(input_ids=[ids(400, 4)] * 7, sampling_params=FEW)
    return 8


def chat_samples(s: Server) -> int:
    words = " ".join(f"{word}" for word in range(10_000, 10_070))
    body = {"model": "m", "messages": [{"role": "user", "content": words}], "n": 8, "max_tokens": 2, **KEEP}
    answer = s.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert 350 < answer.json()["usage"]["prompt_tokens"] < 600
    return 8


def agents_over_one_document(s: Server) -> int:
    s.generate(input_ids=ids(1200, 9) + ids(20, 100), sampling_params=FEW)
    s.generate(input_ids=[ids(1200, 9) + ids(20, agent) for agent in range(7)], sampling_params=FEW)
    return 8


# tests/fast/policy/test_new_tokens.py has these and others on SGLang's prefix cache, without a model.
ARRIVALS = (samples, one_then_equal_ones, chat_samples, agents_over_one_document)


def counted(s: Server, arrive: Callable[[Server], int]) -> tuple[int, int]:
    """Prompt tokens that the scheduler computed for these arrivals from an empty cache, and how many they were."""
    s.flush()
    before = len(s.log())
    requests = arrive(s)
    return sum(map(int, re.findall(r"#new-token: (\d+)", s.log()[before:]))), requests


@pytest.fixture(scope="module")
def model(small_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.build_with_tokenizer(tmp_path_factory.mktemp("tiny"), small_model_path)


@pytest.fixture(scope="module")
def stock(model: Path) -> dict[str, int]:
    with server(model, env=ONE_THREAD) as running:
        return {arrive.__name__: counted(running, arrive)[0] for arrive in ARRIVALS}


@pytest.fixture(scope="module")
def plugin(stock: dict[str, Any], model: Path) -> Iterator[Server]:
    flags = ("--enable-claa", "--claa-profile", "none", "--claa-min-prompt-tokens", "64")
    with server(model, *flags, env=STRICT | ONE_THREAD) as running:
        yield running


@pytest.mark.parametrize("arrive", ARRIVALS, ids=lambda arrive: arrive.__name__)
def test_no_more_new_tokens_than_stock(arrive: Callable[[Server], int], plugin: Server, stock: dict[str, int]) -> None:
    """A pruned request computes its window anew, where stock computes one token."""
    computed, requests = counted(plugin, arrive)
    print(f"{arrive.__name__}: stock {stock[arrive.__name__]:,}, plugin {computed:,}")
    assert computed <= stock[arrive.__name__] + WINDOW * requests
