"""A prefix cache of SGLang's with a policy beside its request table, without a server."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.sampling.sampling_params import SamplingParams

from claa_sglang.config.config import ClaaConfig, PruneStep
from claa_sglang.patches import attached
from claa_sglang.patches.policy import choose_way, must_wait, note_admitted
from claa_sglang.patches.requests import pruned_key
from claa_sglang.policy.cost import Constants, CostModel
from claa_sglang.policy.in_flight import InFlight
from claa_sglang.policy.policy import Policy
from claa_sglang.requests.options import RequestOptions
from claa_sglang.requests.state import RequestState

STEP = PruneStep(prune_layer=14, keep_rate=0.2, score_layers=(13, 14))
CONFIG = ClaaConfig(steps=(STEP,), num_layers=30)
ARITHMETIC = Constants(per_pass=1e-9, per_row=1e-6, per_pair=1e-12, per_prune=1e-9)  # rows are all that costs
PROMPT = list(range(1, 1501))


class World:
    """A prefix cache of SGLang's, with a policy beside its request table."""

    def __init__(self, disable: bool = False) -> None:
        self.pool = ReqToTokenPool(size=8, max_context_len=4096, device="cpu", enable_memory_saver=False)
        allocator = TokenToKVPoolAllocator(60_000, torch.int64, "cpu", None, False)
        params = CacheInitParams(disable, self.pool, allocator, page_size=1, tree_components=(ComponentType.FULL,))
        self.tree, self.allocator = UnifiedRadixCache(params), allocator
        attached.window.hang(self.tree, CONFIG.window)
        self.live = SimpleNamespace(
            config=CONFIG,
            policy=Policy(CONFIG, CostModel(ARITHMETIC), 8192),
            learn=lambda: None,
            in_flight=InFlight(),
            sampled=OrderedDict(),
        )
        attached.policy.hang(self.pool, self.live)

    def cache(self, tokens: list[int], pruned: bool) -> None:
        key = RadixKey(array("q", tokens), extra_key=CONFIG.namespace if pruned else None)
        self.tree.insert(InsertParams(key=key, value=self.allocator.alloc(len(tokens))))

    def request(
        self,
        tokens: list[int],
        n: int = 1,
        new: int = 8,
        rate: float | None = None,
        logprobs_from: int = -1,
        **options: Any,
    ) -> Req:
        params = SamplingParams(max_new_tokens=new, n=n)
        req = Req(f"r{id(params)}", "", array("q", tokens), params, return_logprob=logprobs_from >= 0)
        req.logprob_start_len = logprobs_from
        attached.state.hang(
            req, RequestState.pruned_request(RequestOptions(keep_rate=rate, **options), CONFIG, len(tokens))
        )
        req.extra_key = pruned_key(None, CONFIG.namespace)
        return req

    def way(self, req: Req) -> str:
        """The way chosen, or "waits"; as SGLang asks when it considers a request of the queue."""
        choose_way(req, self.tree)
        if must_wait(req):
            return "waits"
        req.init_next_round_input(self.tree)
        return "pruned" if attached.state.of(req).pruned else "dense"

    def admit(self, req: Req) -> str:
        way = self.way(req)
        if way != "waits":
            req.extend_end = len(req.full_untruncated_fill_ids)
            note_admitted(req, self.tree)
        return way
