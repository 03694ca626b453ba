"""`--claa-policy auto`: when a request is scheduled, both namespaces are matched and the cheaper way is taken.

The decision is open from the request's arrival until it gets its row in the request table, and made anew each time the
scheduler considers it, as the cache changes meanwhile; a request that was once sent the dense way stays dense. Prefills
under way count as cached, and who is better off behind one of them waits in the queue. Stock has no such wait: its
cache-aware policies put requests with the beginning of another at the end of the queue, and admit them all the same.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.runtime_context import get_parallel

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.batch_plan import BatchPlan
from claa_sglang.patches import attached
from claa_sglang.patches.forward_batch import plan_of
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.requests import client_key, dense_key, make_dense, pruned_state, sharers
from claa_sglang.policy.cost import Constants, CostModel, GivenCosts, Work, span_work
from claa_sglang.policy.in_flight import InFlight, Prefill
from claa_sglang.policy.machine import measure
from claa_sglang.policy.policy import NEW, Choice, Flight, Hits, Policy, Prompt
from claa_sglang.policy.prefix_uses import Uses
from claa_sglang.policy.step_timer import StepTimer
from claa_sglang.requests.state import RequestState
from claa_sglang.shadow.running import is_shadow

NO_CHUNK = 1 << 30
SAMPLED = 1000  # requests with several samples whose way is remembered, the latest


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
        # Ranks of tensor parallelism choose alike: by what the first one measured.
        learned = CostModel(start)
        group = get_parallel().attn_tp_group
        cost = learned if group.world_size == 1 else GivenCosts(of_first_rank(start, group))
        self.learned = learned
        self.config = config
        finishing = attached.finishing.find(runner.req_to_token_pool)
        self.policy = Policy(
            config,
            cost,
            chunk if chunk and chunk > 0 else NO_CHUNK,
            graph_tokens=lambda: _graph_tokens(runner),
            finished_share=lambda: 0.0 if finishing is None else finishing.finished.share,
        )
        self.timer = StepTimer(learned, torch.device(runner.device))
        self.in_flight = InFlight()
        self.sampled: OrderedDict[bytes, Choice] = OrderedDict()

    def learn(self) -> None:
        """Go by the steps that ran, where this rank is the only one; else they are heard of (`ranks.py`)."""
        if self.policy.cost is self.learned:
            self.timer.collect()

    def news(self) -> Constants | None:
        """Of the first of several ranks: constants that it learned and the others have not heard of; None if it did
        not."""
        self.timer.collect()
        constants = self.learned.constants
        return None if constants == self.policy.cost.constants else constants

    def adopt(self, constants: Constants) -> None:
        """Of every one of several ranks: choose by these from now on."""
        self.policy.cost = GivenCosts(constants)


def of_first_rank(constants: Constants, group: Any) -> Constants:
    """What the first rank of SGLang's group has."""
    values = torch.tensor(constants, dtype=torch.float64)
    torch.distributed.broadcast(values, src=group.ranks[0], group=group.cpu_group)
    return Constants(*values.tolist())


def _graph_tokens(runner: Any) -> int:
    """Most tokens of a prefill graph; 0 without such graphs. They are captured after the policy is made."""
    return getattr(getattr(runner, "prefill_cuda_graph_runner", None), "max_num_tokens", 0)


def live_policy(pool: Any) -> LivePolicy | None:
    """The policy kept beside SGLang's request table; None before the model is loaded."""
    return attached.policy.find(pool)


def choose_way(req: Any, tree_cache: Any = None, *_args: Any, **_kwargs: Any) -> None:
    """BEFORE `Req.init_next_round_input`, which matches the request's prefix: decide in which namespace, and when."""
    state = attached.state.find(req)
    if state is None or tree_cache is None:
        return
    is_new = state.decision.finished is None
    finished = _finished(req, state, tree_cache)
    if not state.decision.is_open:
        _follow_finished(req, state, tree_cache, finished)
        return
    live = live_policy(tree_cache.req_to_token_pool)
    if live is None:
        return
    live.learn()
    plan, decision = state.plan, state.decision
    if plan.dense_reason is not None:  # it goes the dense way, but has not been admitted yet
        hits = Hits(_hit(tree_cache, req, req.extra_key, 1), 0)
        length, soon = _shared(live, req, req.extra_key, 1)
        way = Choice(False, plan.dense_reason)
        prompt = Prompt(plan.prompt_tokens, (), hits, flight=Flight(length, 0, soon), way=way)
        decision.waits = live.policy.choose(prompt).wait
        return
    own = client_key(req.extra_key)
    hits = _hits(tree_cache, req, own)
    if is_new:
        _note_use(plan.prompt_tokens, hits, finished, tree_cache)
    params = req.sampling_params
    leads = params.max_new_tokens == 0  # SGLang sends the prompt of several samples ahead, to be cached

    def uses() -> Uses:
        """A prompt counts once, however often the scheduler considers it."""
        if decision.uses is None:
            key = sharers(own, req.cache_salt)
            step, answers = live.in_flight.step, not leads
            decision.uses = live.policy.note(req.origin_input_ids, key, hits, step, answers)
        return decision.uses

    dense, soon = _shared(live, req, dense_key(own), 1)
    sampled = _sampled_key(req) if params.n > 1 else None
    choice = live.policy.choose(
        Prompt(
            tokens=plan.prompt_tokens,
            steps=plan.steps,
            hits=hits,
            uses=uses,
            flight=Flight(dense, _shared(live, req, req.extra_key, attached.window.of(tree_cache))[0], soon),
            samples=params.n,
            answers=not leads,
            lasting=_is_cached(req, tree_cache),
            way=None if sampled is None or leads else live.sampled.get(sampled),
            finished=finished,
        )
    )
    if sampled is not None and not choice.wait:
        if sampled not in live.sampled or leads:
            choice = choice._replace(reason=f"{choice.reason}, for all {params.n} samples")
        live.sampled[sampled] = choice
        live.sampled.move_to_end(sampled)
        if len(live.sampled) > SAMPLED:
            live.sampled.popitem(last=False)
    decision.why, decision.waits = choice.reason, choice.wait
    if not choice.prune and not choice.wait:
        make_dense(req, choice.reason)
        decision = attached.state.of(req).decision
        decision.is_open, decision.finished = True, finished  # until it is admitted, it may still wait


def _finished(req: Any, state: RequestState, tree: Any) -> int:
    """Prompt tokens, from the first, that were pruned in the cache and were made dense. Looked up once a request."""
    finishing = attached.finishing.find(tree.req_to_token_pool)
    if finishing is None or not state.pruned:
        return state.decision.finished or 0
    if state.decision.finished is None:
        own = client_key(req.extra_key)
        state.decision.finished = finishing.finished.length(req.origin_input_ids, sharers(own, req.cache_salt))
    return state.decision.finished


def _note_use(tokens: int, hits: Hits, finished: int, tree: Any) -> None:
    """A prompt that uses what a pruned request left teaches in what share of cases that was finished by then."""
    finishing = attached.finishing.find(tree.req_to_token_pool)
    if finishing is not None and max(finished, hits.pruned) > NEW * tokens:
        finishing.finished.note(in_time=finished > NEW * tokens)


def _follow_finished(req: Any, state: RequestState, tree: Any, finished: int) -> None:
    """A request that is pruned whatever it costs (`--claa-policy always`) goes dense after a prefix that was finished,
    where that is less work: its pruned copy was let go, and the dense way is what stock would do."""
    plan = state.plan
    if not finished or not state.pruned or plan.options.keep is not None or req.kv.holds_kv:
        return
    if state.progress.kept[0] is not None:
        return  # retracted: it goes on as it began
    hits = _hits(tree, req, client_key(req.extra_key))
    live = live_policy(tree.req_to_token_pool)
    if live is not None and (reason := live.policy.follows(plan.prompt_tokens, plan.steps, hits, finished)):
        make_dense(req, reason)
        attached.state.of(req).decision.finished = finished


def must_wait(req: Any) -> bool:
    """Whether the request is not to run in the step that is being made."""
    state = attached.state.find(req)
    return state is not None and state.decision.is_open and state.decision.waits


def start_step(tree_cache: Any) -> None:
    """A new prefill step is being made."""
    if live := live_policy(tree_cache.req_to_token_pool):
        live.in_flight.begin_step()


def note_admitted(req: Any, tree_cache: Any) -> None:
    """A request was admitted: what it computes will be in the prefix cache."""
    live = live_policy(tree_cache.req_to_token_pool)
    if live is None or not _is_cached(req, tree_cache):
        return
    live.in_flight.add(
        Prefill(
            tokens=req.full_untruncated_fill_ids,
            key=(req.extra_key, req.cache_salt),
            alive=lambda: req.kv.holds_kv and not req.output_ids and not req.finished(),
            ends=lambda: req.extend_end >= len(req.full_untruncated_fill_ids),
        )
    )


def match_where_it_goes(original: Any, self: Any, waiting_queue: list, policy: Any) -> Any:
    """AROUND `SchedulePolicy._compute_prefix_matches`, which sorts by what is cached of each request.

    One that is not decided on is matched where more of it is cached, so that its place is the one it has in stock.
    """
    moved = []
    for req in waiting_queue:
        state = pruned_state(req)
        if state is not None and state.decision.is_open:
            own = client_key(req.extra_key)
            hits = _hits(self.tree_cache, req, own)
            if hits.dense > hits.pruned:
                moved.append((req, req.extra_key))
                req.extra_key = dense_key(own)
    try:
        return original(self, waiting_queue, policy)
    finally:
        for req, key in moved:
            req.extra_key = key


def _is_cached(req: Any, tree: Any) -> bool:
    """Whether others will find in the prefix cache what is computed for this request."""
    misses = envs.SGLANG_RADIX_FORCE_MISS.get()
    return tree.supports_prefix_sharing() and not misses and not req.skip_radix_cache_insert


def _hits(tree: Any, req: Any, own: str | None) -> Hits:
    """What SGLang would take from the cache for a pruned request, dense and pruned."""
    return Hits(_hit(tree, req, dense_key(own), 1), _hit(tree, req, req.extra_key, attached.window.of(tree)))


def _hit(tree: Any, req: Any, key: str | None, tail: int) -> int:
    """Prompt tokens that SGLang would take from the prefix cache under `key`, computing at least the last `tail`."""
    if envs.SGLANG_RADIX_FORCE_MISS.get():
        return 0
    radix_key = RadixKey(req.origin_input_ids, extra_key=key, limit=_limit(req, tail), cache_salt=req.cache_salt)
    return int(tree.match_prefix(MatchPrefixParams(key=radix_key)).device_prefix_len)


def _shared(live: LivePolicy, req: Any, key: str | None, tail: int) -> tuple[int, bool]:
    """As `_hit`, of what prefills under way will leave in the cache; and whether that is there after this step."""
    return live.in_flight.shared(req.origin_input_ids, (key, req.cache_salt), _limit(req, tail))


def _limit(req: Any, tail: int) -> int:
    """Most prompt tokens that may come from the cache. SGLang leaves out the last one, and those whose input log
    probabilities are asked for."""
    length = len(req.origin_input_ids)
    return max(0, min(length - tail, req._compute_max_prefix_len(length)))


def _sampled_key(req: Any) -> bytes:
    """The same for all samples of a request."""
    name = f"{req.extra_key}|{req.cache_salt}|{req.sampling_params.n}|{attached.state.of(req).plan.options}"
    prompt = array("q", req.origin_input_ids).tobytes()
    return blake2b(prompt, digest_size=16, key=blake2b(name.encode("utf-8", "surrogatepass")).digest()).digest()


def time_prefill(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND `ModelRunner.forward`: the time of a prefill step teaches the cost model. Nothing waits for it."""
    live = live_policy(runner.req_to_token_pool)
    shadow = any(map(is_shadow, forward_batch.rids or ()))  # its logits of many rows are no measure of others
    if live is None or shadow or not forward_batch.forward_mode.is_extend():
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
    for level, (segments, end) in enumerate(zip(plan.levels, ends, strict=True)):
        if level or not plan.only_late:
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
        "sglang.srt.managers.schedule_policy.SchedulePolicy._compute_prefix_matches",
        ("self", "waiting_queue", "policy"),
        "around",
        match_where_it_goes,
        "scheduler",
        "A request that is not decided on is sorted by what is cached of it in either namespace.",
    ),
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
