"""KV rows moved and gathered as bits, 8-bit floats among them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from claa_sglang.memory.kv_rows import gather, move

FP8 = torch.float8_e4m3fn
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)


def rows(dtype: torch.dtype) -> Tensor:
    """Six slots of two heads; no row is another's."""
    return torch.arange(6 * 2 * 4).view(6, 2, 4).sub(20).to(torch.float32).to(dtype)


@DTYPES
def test_rows_move_bit_for_bit_and_others_stay(dtype: torch.dtype) -> None:
    buffer, before = rows(dtype), rows(dtype)
    move(buffer, torch.tensor([1, 4]), torch.tensor([5, 0]))
    expected = before.float()[[4, 1, 2, 3, 4, 1]]
    assert torch.equal(buffer.float(), expected)


@DTYPES
def test_gathered_8_bit_floats_are_of_the_type_asked_for(dtype: torch.dtype) -> None:
    found = gather(rows(dtype), torch.tensor([3, 3, 0], dtype=torch.int32), torch.bfloat16)
    assert found.dtype == (torch.bfloat16 if dtype == FP8 else dtype)
    assert torch.equal(found.float(), rows(dtype).float()[[3, 3, 0]])
