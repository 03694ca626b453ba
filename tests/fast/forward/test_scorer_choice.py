"""What `--claa-scorer` becomes at start, with measurements that are made up: the kernels need a GPU."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from claa_sglang.forward import scorer_choice
from claa_sglang.forward.scorer_choice import Choice, choose, faster
from claa_sglang.forward.scorers import FlashInferScorer, KernelScorer, in_kernels
from claa_sglang.forward.warm_up import warm_up
from claa_sglang.kernels import paged_lse
from claa_sglang.ranking.spec import RankerSpec
from tests.fast import states

KEYS = torch.zeros(100, 2, 64, dtype=torch.bfloat16)
TABLE = torch.zeros(3, 200, dtype=torch.int32)


def chosen(scorer: Any, keys: torch.Tensor = KEYS) -> Choice:
    config = msgspec.structs.replace(states.CONFIG, scorer=scorer)
    ranker = in_kernels(RankerSpec(), config)
    assert ranker is not None
    return choose(config, keys, 4, TABLE, ranker)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[type, float | Exception]:
    """Microseconds of a layer by scorer, or what it raises; FlashInfer counts as compiled."""
    found: dict[type, float | Exception] = {KernelScorer: 100.0, FlashInferScorer: 50.0}

    def layer(kind: type, config: Any, keys: Any, heads: int, table: Any, ranker: Any, tokens: int) -> Any:
        assert config.window < tokens <= 100
        if isinstance(time := found[kind], Exception):
            raise time
        return lambda: time

    monkeypatch.setattr(scorer_choice, "_layer", layer)
    monkeypatch.setattr(scorer_choice, "_median", lambda run: run())
    monkeypatch.setattr(paged_lse, "is_ready", lambda dtype, head_dim: True)
    return found


def test_what_was_asked_for_is_taken(times: dict) -> None:
    for scorer in ("triton", "flashinfer", "torch"):
        assert chosen(scorer) == Choice(scorer, "as configured", {})  # type: ignore[arg-type]


def test_auto_takes_the_faster(times: dict) -> None:
    assert chosen("auto") == Choice("flashinfer", "measured", {"triton": 100.0, "flashinfer": 50.0})
    times[FlashInferScorer] = 101.0
    assert chosen("auto").scorer == "triton"


@pytest.mark.parametrize(("flashinfer", "scorer"), [(94.9, "flashinfer"), (95.1, "triton"), (100.0, "triton")])
def test_auto_keeps_triton_where_they_are_close(flashinfer: float, scorer: str) -> None:
    assert faster({"triton": 100.0, "flashinfer": flashinfer}).scorer == scorer


def test_auto_compiles_nothing_and_survives_what_fails(times: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    times[FlashInferScorer] = ValueError("no such kernel")
    choice = chosen("auto")
    assert choice.scorer == "triton" and "FlashInfer failed: ValueError: no such kernel" in choice.reason
    monkeypatch.setattr(paged_lse, "is_ready", lambda dtype, head_dim: False)
    assert chosen("auto") == Choice("triton", scorer_choice.NOT_AT_HAND, {})


def test_auto_without_slots_for_a_request_is_triton(times: dict) -> None:
    assert chosen("auto", KEYS[: states.CONFIG.window]).scorer == "triton"


def test_flashinfer_that_cannot_run_stops_the_start(times: dict) -> None:
    times[FlashInferScorer] = ImportError("No module named 'flashinfer'")
    with pytest.raises(RuntimeError, match="--claa-scorer flashinfer: cannot run here: ImportError: .*Remedy: start"):
        chosen("flashinfer")


def test_what_flashinfer_has_no_kernel_for_is_triton_s(times: dict) -> None:
    choice = chosen("flashinfer", KEYS.float())
    assert choice == Choice("triton", "FlashInfer has no kernel for torch.float32 and head size 64", {})


def test_without_a_gpu_it_is_torch() -> None:
    assert warm_up(KEYS, 4, KEYS.dtype, TABLE, [], states.CONFIG) == Choice("torch", "there is no GPU", {})
