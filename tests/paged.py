"""A batch of prompts in a paged KV cache, for the kernels: slots in any order, and garbage wherever nobody may look."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from claa_sglang.kernels.layout import describe


class Shape(NamedTuple):
    """Its text is a test's id: T40+9-W8-H4/2-D16-bf16, with -fp8 behind it where keys are fp8 e4m3."""

    tokens: tuple[int, ...]
    window: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    fp8_keys: bool = False

    def __str__(self) -> str:
        dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]
        tokens = "+".join(map(str, self.tokens))
        return f"T{tokens}-W{self.window}-H{self.heads}/{self.kv_heads}-D{self.dim}-{dtype}{'-fp8' * self.fp8_keys}"


class Batch(NamedTuple):
    """Arguments of `window_mass`, and what `fold` needs of them."""

    q: Tensor
    key_buffer: Tensor
    table: Tensor
    requests: Tensor
    max_tokens: int
    positions: int


def make_batch(shape: Shape, *, device: str = "cpu", spread: float = 2.0, seed: int = 0) -> Batch:
    """Random queries and keys of standard deviation `spread`: attention with peaks, so that a wrong mask shows.

    q and key_buffer are views of larger tensors; slots are shuffled; the last request has the lowest table row. Every
    number that no request may read is NaN, and table columns past a request's end name such a slot.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens, window, heads, kv_heads, dim, dtype, fp8_keys = shape
    count, used = len(tokens), sum(tokens)
    nan = {"dtype": dtype, "device": device}
    gap = 3  # query rows of other tokens between the windows
    q = torch.full((count * (window + gap), heads + 1, dim), torch.nan, **nan)[:, :heads]
    buffer = torch.full((used + 2, kv_heads + 2, dim + 16), torch.nan, **nan)
    keys = _heads(buffer, kv_heads)
    slots = torch.randperm(used, generator=generator, device=device).int() + 1
    table = torch.zeros(count + 1, max(tokens) + 5, dtype=torch.int32, device=device)
    keys[slots.long()] = (spread * torch.randn(used, kv_heads, dim, generator=generator, device=device)).to(dtype)
    first_rows, table_rows, start = [], [], 0
    for i, length in enumerate(tokens):
        first_rows.append(i * (window + gap) + gap)
        table_rows.append(count - i)
        rows = spread * torch.randn(window, heads, dim, generator=generator, device=device)
        q[first_rows[i] : first_rows[i] + window] = rows.to(dtype)
        table[table_rows[i], :length] = slots[start : start + length]
        start += length
    requests = torch.tensor(describe(first_rows, table_rows, tokens, window), dtype=torch.int32, device=device)
    if fp8_keys:
        keys = _heads(buffer.to(torch.float8_e4m3fn), kv_heads)
    return Batch(q, keys, table, requests, max(tokens), used - count * window)


def _heads(buffer: Tensor, kv_heads: int) -> Tensor:
    return buffer[:, 1 : kv_heads + 1, 16:]


def dequantised(batch: Batch) -> Batch:
    """With keys of the queries' dtype, which holds those of fp8 exactly."""
    return batch._replace(key_buffer=batch.key_buffer.to(batch.q.dtype))
