"""Keys of 8 bits are kept divided by a scale, which scoring has to give back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from claa_sglang.forward.stage_times import StageTimes
from claa_sglang.patches.attention import ClaaAttnBackend
from tests.fast.states import CONFIG

FP8 = torch.float8_e4m3fn


class Active:
    """A pass that notes the factor on the logits."""

    factor = 0.0

    def needs_scores(self, _level: int, _layer: int) -> bool:
        return True

    def score(self, _level: int, _queries: Any, _keys: Any, scaling: float) -> None:
        self.factor = scaling


@pytest.mark.parametrize(
    ("dtype", "scale", "factor"), [(FP8, 2.0, 1.0), (FP8, None, 0.5), (torch.bfloat16, 2.0, 0.5)], ids=str
)
def test_logits_of_8_bit_keys_are_multiplied_with_their_scale(
    dtype: torch.dtype, scale: float | None, factor: float
) -> None:
    layer = SimpleNamespace(layer_id=0, tp_q_head_num=2, qk_head_dim=4, scaling=0.5, k_scale_float=scale)
    backend = object.__new__(ClaaAttnBackend)
    backend.active, backend.attn_backend_list = Active(), [SimpleNamespace(forward=lambda *_a, **_k: "out")]
    backend.config, backend.stages = CONFIG, StageTimes()
    backend.token_to_kv_pool = SimpleNamespace(get_key_buffer=lambda _layer: torch.zeros(3, 1, 4, dtype=dtype))
    assert backend.forward(torch.zeros(1, 8), None, None, layer, None) == "out"
    assert backend.active.factor == factor
