"""Rankings of many prompts at once: their order as numbers that can be compared, and `carry` for all of them.

A sort of keys answers everything that is asked of an order here, and a key holds its token's position, so no indices
are carried along. On the CPU numpy sorts 64-bit keys with vector instructions, four times as fast as torch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_POSITION = 0xFFFFFFFF
FIRST = torch.iinfo(torch.int64).min  # below every key
TOKEN_0 = FIRST + (1 << 32)  # a key of the first token that is below every other's


def keys(rankings: Tensor) -> Tensor:
    """int64 [P, M] of rankings, fp32 [P, M]: the smaller the key, the higher the token stands.

    In `selection.by_rank`'s order: of equal values the lower position first, and NaN as -inf. All differ within a row.
    """
    values = rankings.masked_fill(rankings.isnan(), -torch.inf) + 0.0  # -0 becomes 0, which it equals
    bits = values.contiguous().view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    positions = torch.arange(rankings.shape[1], device=rankings.device)
    return ((~ascending).to(torch.int64) << 32) | positions


def ascending(of_keys: Tensor) -> Tensor:
    """Each row of `keys` sorted: what stands highest comes first."""
    if of_keys.device.type == "cpu":
        return torch.from_numpy(np.sort(of_keys.numpy(), axis=1))
    return of_keys.sort(dim=1).values


def positions(of_keys: Tensor) -> Tensor:
    """int64: the token of each key."""
    return of_keys & _POSITION


def strengths(counts: Tensor, width: int) -> Tensor:
    """fp64 [P, width]: `carry.carry`'s u of the tokens of each prompt in the order of their rank, for `carried`.

    counts: int64 [P], how many ranked tokens a prompt has; behind them the values mean nothing.
    """
    place = torch.arange(width, dtype=torch.float64, device=counts.device)
    return -torch.log((place + 1) / counts[:, None])


def carried(rankings: Tensor, loss: float | None, by_rank: Tensor, counts: Tensor) -> Tensor:
    """`carry.carry` of each row's first tokens, or `carry.places` without a loss; the references are there.

    rankings: fp32 [P, M], -inf behind the tokens of a shorter prompt; loss: above 0, None to carry nothing; by_rank:
    `strengths` of counts.
    Returns fp32 [P, M], -inf behind the tokens again.
    """
    place = torch.arange(rankings.shape[1], device=rankings.device)
    order = positions(ascending(keys(rankings)))
    found = torch.empty_like(by_rank).scatter_(1, order, by_rank)
    if loss is not None:
        lost = loss * place.double()
        found = torch.cummax(found.add_(lost), dim=1).values.sub_(lost)
    return found.float().masked_fill_(place >= counts[:, None], -torch.inf)
