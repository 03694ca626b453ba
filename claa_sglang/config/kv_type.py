"""The type of KV rows, by `--kv-cache-dtype` and by what a checkpoint records: the model's own, or 8-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

BF16 = ("bf16", "bfloat16")
FP8 = "fp8_e4m3"


class KvType(Enum):
    """OWN: the model's. FP8: e4m3, whose rows hold a boundary state as bytes. OTHER: not known to hold one exactly."""

    OWN = "own"
    FP8 = "fp8"
    OTHER = "other"


def kv_type(asked: str, model_dtype: str, record: Mapping[str, Any] | None) -> KvType:
    """The type that KV rows may have.

    Args:
        asked: `--kv-cache-dtype`.
        model_dtype: the model's, as torch writes it.
        record: the checkpoint's quantization record. SGLang goes by it under "auto", with some methods of quantization;
            the narrower type is said here.
    """
    if asked == FP8:
        return KvType.FP8
    if asked in BF16:
        return KvType.OWN if model_dtype == "torch.bfloat16" else KvType.OTHER
    if asked != "auto":
        return KvType.OTHER
    records = (record or {}, (record or {}).get("quantization") or {})
    schemes = [r["kv_cache_scheme"] for r in records if r.get("kv_cache_scheme")]
    algorithms = [r["kv_cache_quant_algo"] for r in records if r.get("kv_cache_quant_algo")]
    if not schemes and not algorithms:
        return KvType.OWN
    is_fp8 = all(s.get("num_bits") == 8 and s.get("type") == "float" for s in schemes)
    return KvType.FP8 if is_fp8 and all(a == "FP8" for a in algorithms) else KvType.OTHER
