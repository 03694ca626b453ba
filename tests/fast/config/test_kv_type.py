"""Which type KV rows may have, by what is asked and what a checkpoint records."""

from __future__ import annotations

from typing import Any

import pytest

from claa_sglang.config.kv_type import KvType, kv_type

FP8_SCHEME, INT8_SCHEME = ({"num_bits": 8, "type": kind} for kind in ("float", "int"))


@pytest.mark.parametrize(
    ("asked", "dtype", "record", "expected"),
    [
        ("auto", "bfloat16", None, KvType.OWN),
        ("auto", "bfloat16", {"quant_method": "awq"}, KvType.OWN),
        ("bf16", "bfloat16", None, KvType.OWN),
        ("bfloat16", "float32", None, KvType.OTHER),
        ("fp8_e4m3", "bfloat16", None, KvType.FP8),
        ("fp8_e4m3", "float16", {"kv_cache_scheme": INT8_SCHEME}, KvType.FP8),  # what is asked wins
        ("bf16", "bfloat16", {"kv_cache_scheme": FP8_SCHEME}, KvType.OWN),
        ("fp8_e5m2", "bfloat16", None, KvType.OTHER),
        ("auto", "bfloat16", {"kv_cache_scheme": FP8_SCHEME}, KvType.FP8),
        ("auto", "bfloat16", {"kv_cache_scheme": INT8_SCHEME}, KvType.OTHER),
        ("auto", "bfloat16", {"quantization": {"kv_cache_quant_algo": "FP8"}}, KvType.FP8),
        ("auto", "bfloat16", {"kv_cache_quant_algo": "NVFP4"}, KvType.OTHER),
        ("auto", "bfloat16", {"kv_cache_quant_algo": "FP8", "quantization": {"kv_cache_scheme": INT8_SCHEME}},
         KvType.OTHER),
    ],
)  # fmt: skip
def test_the_type(asked: str, dtype: str, record: dict[str, Any] | None, expected: KvType) -> None:
    assert kv_type(asked, f"torch.{dtype}", record) is expected
