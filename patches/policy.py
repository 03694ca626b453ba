"""`--claa-policy auto`: when a request is scheduled, both namespaces are matched and the cheaper way is taken.

The decision is open from the request's arrival until it gets its row in the request table, and made anew each time the
scheduler considers it, as the cache changes meanwhile; a request that was once sent the dense way stays dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.batch_plan import BatchPlan
from claa_sglang.patches.forward_batch import plan_of
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.requests import client_key, dense_key, make_dense, pruned_state
from claa_sglang.policy.cost import CostModel, Work, span_work
from claa_sglang.policy.machine import measure
from claa_sglang.policy.policy import Hits, Policy
from claa_sglang.policy.step_timer import StepTimer

NO_CHUNK = 1 << 30


class LivePolicy:
    """The policy of this scheduler, and the clock that teaches it.

    Args:
        runner: SGLang's model runner, its layers loaded.
        layer: one decoder layer.
        heads: query heads of this rank.
        config: the server's configuration.
    """

    def __init__(self, runner: Any, layer: torch.nn.Module, heads: int, config: ClaaConfig) -> None:
        chunk = runner.server_args.chunked_prefill_size
        start = measure(
            hidden_size=runner.model_config.hidden_size,
            heads=heads,
            head_dim=runner.model_config.head_dim,
            weights=sum(weight.numel() for weight in layer.parameters()),
            dtype=runner.dtype,
            device=torch.device(runner.device),
        )
        cost = CostModel(start)
        self.config = config
        self.policy = Policy(
            config, cost, chunk if chunk and chunk > 0 else NO_CHUNK, graph_tokens=lambda: _graph_tokens(runner)
        )
        self.timer = StepTimer(cost, torch.device(runner.device))


def _graph_tokens(runner: Any) -> int:
    """Most tokens of a prefill graph; 0 without such graphs. They are captured after the policy is made."""
    return getattr(getattr(runner, "prefill_cuda_graph_runner", None), "max_num_tokens", 0)


def live_policy(pool: Any) -> LivePolicy | None:
    """The policy kept beside SGLang's request table; None before the model is loaded."""
    return getattr(pool, "claa_policy", None)


def choose_way(req: Any, tree_cache: Any = None, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE `Req.init_next_round_input`, which matches the request's prefix: decide in which namespace."""
    state = pruned_state(req)
    if state is None or not state.is_open or tree_cache is None:
        return
    live = live_policy(tree_cache.req_to_token_pool)
    if live is None:
        return
    live.timer.collect()
    prompt, own = req.origin_input_ids, client_key(req.extra_key)
    hits = Hits(
        dense=_hit(tree_cache, req, dense_key(own), len(prompt) - 1),
        pruned=_hit(tree_cache, req, req.extra_key, len(prompt) - tree_cache.claa_window),
    )

    def uses() -> float:
        """A prompt counts once, however often the scheduler considers it."""
        if state.prefix_uses is None:
            state.prefix_uses = live.policy.note(prompt, f"{own}|{req.cache_salt}", hits)
        return state.prefix_uses

    choice = live.policy.choose(len(prompt), state.steps, hits, uses)
    state.choice = choice.reason
    if not choice.prune:
        make_dense(req, choice.reason)


def _hit(tree: Any, req: Any, key: str | None, limit: int) -> int:
    """Prompt tokens, of the first `limit`, that are in the prefix cache under `key`."""
    radix_key = RadixKey(req.origin_input_ids, extra_key=key, limit=limit, cache_salt=req.cache_salt)
    return int(tree.match_prefix(MatchPrefixParams(key=radix_key)).device_prefix_len)


def time_prefill(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `ModelRunner.forward`: the time of a prefill step teaches the cost model. Nothing waits for it."""
    live = live_policy(runner.req_to_token_pool)
    if live is None or not forward_batch.forward_mode.is_extend():
        return original(runner, forward_batch, *args, **kwargs)
    work = work_of(forward_batch, live.config)  # before the forward, which may pad the batch
    with live.timer.step() as step:
        output = original(runner, forward_batch, *args, **kwargs)
        step.work = work._replace(eager=0) if output.can_run_graph else work
    return output


def work_of(forward_batch: Any, config: ClaaConfig) -> Work:
    """What the layers do in one prefill forward of SGLang's."""
    plan: BatchPlan | None = plan_of(forward_batch)
    if plan is None:
        spans = zip(forward_batch.extend_prefix_lens_cpu, forward_batch.extend_seq_lens_cpu, strict=True)
        return _level_work(config.num_layers, [(prefix, prefix + rows) for prefix, rows in spans])
    ends = [*(step.prune_layer + 1 for step in config.steps), config.num_layers]
    total, first = Work(), 0
    for segments, end in zip(plan.levels, ends, strict=True):
        total = total.plus(_level_work(end - first, [(s.prefix_len, s.seq_len) for s in segments]))
        first = end
    return total._replace(prunes=float(any(s.state is not None for s in plan.levels[1])))


def _level_work(layers: int, spans: list[tuple[int, int]]) -> Work:
    """One forward of `layers` over spans of several sequences: its layers are run once."""
    total = Work()
    for prefix, end in spans:
        total = total.plus(span_work(layers, prefix, end))
    passes = layers if total.rows else 0
    return total._replace(passes=passes, eager=passes)


HOOKS = (
    Hook(
        "sglang.srt.managers.schedule_batch.Req.init_next_round_input",
        ("self", "tree_cache", "cow_mamba"),
        "before",
        choose_way,
        "scheduler",
        "Where a waiting request's prefix is matched, it is decided whether pruning it pays.",
    ),
    Hook(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward",
        (
            "self",
            "forward_batch",
            "skip_attn_backend_init",
            "pp_proxy_tensors",
            "reinit_attn_backend",
            "split_forward_count",
        ),
        "around",
        time_prefill,
        "scheduler",
        "The time of each prefill step refines the cost model, by which the policy chooses.",
    ),
)
