"""The composite attention backend: one child per level, each the backend SGLang would have built.

Level 0 is stock's backend over the stock request table. The child of each later level is a second instance of the same
backend over the widened table, planned for that level's view. A batch without pruned requests goes to level 0 for all
layers: stock, untouched. Only captured decode graphs differ: one graph serves both kinds, so its late layers run on the
late child even when every request is dense, pointed at stock's own rows.

With `--claa-decode-dense-layers` there is one more instance: generated tokens read kept prompt tokens there, in the
early layers that are restricted so, over the rows of `forward/kept_rows.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator

from claa_sglang.config.config import ClaaConfig
from claa_sglang.forward.active_pass import ActivePass
from claa_sglang.forward.batch_plan import BatchPlan
from claa_sglang.forward.graph_decode import DecodeBuffers, DecodeGraphPass
from claa_sglang.forward.kept_rows import KeptView, list_kept
from claa_sglang.forward.late_pass import LatePass
from claa_sglang.forward.observe_pass import ObservePass
from claa_sglang.forward.ranks import Ranks
from claa_sglang.forward.stage_times import SCORE, StageTimes
from claa_sglang.memory.late_slots import LateSlots
from claa_sglang.patches import attached
from claa_sglang.patches.forward_batch import observed_of, plan_of
from claa_sglang.patches.hooks import Hook
from claa_sglang.patches.memory import late_slots_of
from claa_sglang.patches.ranks import model_ranks
from claa_sglang.start import startup_time
from claa_sglang.start.server_config import config_of


class LateRunner:
    """SGLang's model runner as a late child sees it: the same, with another request table and slot translator."""

    def __init__(self, runner: Any, table: torch.Tensor) -> None:
        pool = copy.copy(runner.req_to_token_pool)
        pool.req_to_token = table
        self._runner = runner
        self.req_to_token_pool = pool
        self.kv_index_translator = KVIndexTranslator(
            req_to_token=table,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            token_to_kv_pool=runner.token_to_kv_pool,
            page_size=runner.page_size or 1,
            device=runner.device,
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)


class ClaaAttnBackend(AttentionBackend):
    """Sends each layer to the child of its level and scores the layers that rank.

    Args:
        children: one backend per level, and one more for views of kept tokens if the configuration has such layers.
        translators: per child after the first, the slot translator its view is bound to.
        slots: the late slots, with the widened table.
        config: the server's configuration.
        ranks: those of tensor parallelism; None for a model that is not split.
        stages: times of CLAA's own stages.
    """

    def __init__(
        self,
        children: list[AttentionBackend],
        translators: list[KVIndexTranslator],
        slots: LateSlots,
        config: ClaaConfig,
        ranks: Ranks | None,
        stages: StageTimes,
    ) -> None:
        super().__init__()
        self.early = children[0]
        # Class-level defaults of AttentionBackend would hide the child's values from __getattr__.
        for name, default in vars(AttentionBackend).items():
            if not name.startswith("_") and not callable(default) and not isinstance(default, property):
                setattr(self, name, getattr(self.early, name))
        self.attn_backend_list = children
        self.slots = slots
        self.config = config
        self.stages = stages
        self.active: ActivePass | ObservePass | None = None
        self._next_plan: BatchPlan | None = None
        self._translators = translators
        self._ranks = ranks

    def __getattr__(self, name: str) -> Any:
        if name == "early":  # before __init__, as copy and pickle ask
            raise AttributeError(name)
        return getattr(self.early, name)

    # --- planning ------------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.active = None
        self.early.init_forward_metadata(forward_batch)
        plan: BatchPlan | None = plan_of(forward_batch)
        if plan is None:
            observed = observed_of(forward_batch)
            if observed is not None:
                self.active = ObservePass(observed, self.slots.table, self.config)
        else:
            self.active = LatePass(
                plan,
                forward_batch,
                self.slots.table,
                self.config,
                self._prepare_view,
                self._ranks,
                shared=self.slots.pages.are_shared,
                checked=_is_checked(),
            )

    def _prepare_view(self, view: Any, level: int) -> None:
        translator = self._translators[level - 1]
        translator.own_plan(view).bind(view, translator)
        self.attn_backend_list[level].init_forward_metadata(view)

    # --- captured decode graphs ----------------------------------------------------------------------------------

    def note(self, plan: BatchPlan | None) -> None:
        """The plan of the forward that comes next, for a graph's replay; `forward_batch.py` says why."""
        self._next_plan = plan

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        for child in self.attn_backend_list:
            child.init_cuda_graph_state(max_bs, max_num_tokens)
        self._buffers = DecodeBuffers(len(self.attn_backend_list) - 1, max_bs, self.slots.table.device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return self.early.get_cuda_graph_seq_len_fill_value()

    def on_after_cuda_graph_warmup(self) -> None:
        for child in self.attn_backend_list:
            child.on_after_cuda_graph_warmup()

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if not forward_batch.forward_mode.is_decode():
            self.active = None
            self.early.init_forward_metadata_out_graph(forward_batch, in_capture)
            return
        self.early.init_forward_metadata_out_graph(forward_batch, in_capture)
        buffers, count = self._buffers, forward_batch.batch_size
        plan = None if in_capture else self._next_plan
        lens_cpu = None
        if plan is None:
            buffers.fill_dense(forward_batch)
        else:
            lens_cpu = buffers.fill(forward_batch, plan)
            list_kept(plan, self.slots.table, forward_batch.out_cache_loc, _is_checked())
        buffers.find_slots(self.slots.table, count, forward_batch.out_cache_loc)
        views = [forward_batch]
        for level in range(1, len(self.attn_backend_list)):
            view = buffers.view(forward_batch, level)
            if lens_cpu is not None:
                view.seq_lens_cpu = lens_cpu[level - 1]
                view.seq_lens_sum = int(view.seq_lens_cpu.sum())
            self._translators[level - 1].bind_runner_slots(view)
            self.attn_backend_list[level].init_forward_metadata_out_graph(view, in_capture)
            views.append(view)
        kept = KeptView(views[-1]) if self.config.kept_layers else None
        self.active = DecodeGraphPass(views, buffers.boundary[:count], kept) if in_capture else None

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self.early.init_forward_metadata_in_graph(forward_batch)
        if isinstance(self.active, DecodeGraphPass):
            for child, view in zip(self.attn_backend_list[1:], self.active.views[1:], strict=True):
                child.init_forward_metadata_in_graph(view)

    # Breakable prefill graphs hold the stock path alone: batches with pruned requests are not replayed.

    def init_forward_metadata_for_breakable_cuda_graph_capture(self, forward_batch: Any) -> None:
        self.active = None
        self.early.init_forward_metadata_for_breakable_cuda_graph_capture(forward_batch)

    def prepare_forward_metadata_for_breakable_cuda_graph_replay(
        self, capture_metadata: Any, forward_batch: Any, *, static_forward_batch: Any = None
    ) -> None:
        self.active = None
        self.early.prepare_forward_metadata_for_breakable_cuda_graph_replay(
            capture_metadata, forward_batch, static_forward_batch=static_forward_batch
        )

    # --- attention -----------------------------------------------------------------------------------------------

    def level_of(self, layer_id: int) -> int:
        """Number of prunes before layer `layer_id`."""
        return sum(layer_id > step.prune_layer for step in self.config.steps)

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any
    ) -> Any:
        if self.active is None:
            return self.early.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        level = 0 if isinstance(self.active, ObservePass) else self.level_of(layer.layer_id)
        kept = self.active.kept if layer.layer_id in self.config.kept_layers else None
        if kept is not None and kept.rows is None:
            return self.attn_backend_list[-1].forward(q, k, v, layer, kept.batch, save_kv_cache, **kwargs)
        out = self.attn_backend_list[level].forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if kept is not None:
            # Their KV is in the cache; what all rows gave for them, over the whole prompt, is replaced.
            own = (x[kept.rows] for x in (q, k, v))
            out[kept.rows] = self.attn_backend_list[-1].forward(*own, layer, kept.batch, False, **kwargs)
        # After the child: some backends write this forward's keys to the pool only then.
        if self.active.needs_scores(level, layer.layer_id):
            queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
            keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
            with self.stages.stage(SCORE):
                self.active.score(level, queries, keys, layer.scaling * _key_scale(layer, keys))
        return out

    # --- what a wrapper must pass on -----------------------------------------------------------------------------

    def support_triton(self) -> bool:
        return self.early.support_triton()

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """Where reads of what the scheduler may change end: a prefill with a prune reads tables between layers."""
        ends = SharedReadEnds.max_of(child.shared_read_ends(fm) for child in self.attn_backend_list)
        if self.active is None or fm.is_decode():
            return ends
        return SharedReadEnds.max_of((ends, SharedReadEnds.POST_REPLAY))

    def resolve_prefill_shared_read_ends(
        self, forward_batch: Any, *, num_qo_tokens: int, build_snapshot: bool = True
    ) -> SharedReadEnds:
        if plan_of(forward_batch) is not None or observed_of(forward_batch) is not None:
            return SharedReadEnds.UNKNOWN  # the whole forward
        return self.early.resolve_prefill_shared_read_ends(
            forward_batch, num_qo_tokens=num_qo_tokens, build_snapshot=build_snapshot
        )

    def can_run_prefill_cuda_graph(self, forward_batch: Any) -> bool:
        """A batch with pruned requests changes its number of rows half-way: no captured graph has that shape. One with
        observed requests is scored, which no graph does."""
        ask = getattr(self.early, "can_run_prefill_cuda_graph", None)
        is_stock = plan_of(forward_batch) is None and observed_of(forward_batch) is None
        return is_stock and (ask is None or ask(forward_batch))


def _is_checked() -> bool:
    """Whether SGLang looks at the owners of single slots in every step, as we do then."""
    return envs.SGLANG_CHECK_KV_PAGE_INVARIANTS.get()


def _key_scale(layer: Any, keys: torch.Tensor) -> float:
    """What a key is multiplied with to be what the layer computed: keys of 8 bits are kept divided by it."""
    return (layer.k_scale_float or 1.0) if keys.element_size() == 1 else 1.0


def build_composite(original: Any, *, model_runner: Any, resolved: Any, init_new_workspace: bool) -> AttentionBackend:
    """AROUND `_build_resolved_backend`: the stock backend, and one more instance of it for each other kind of row."""
    early = original(model_runner=model_runner, resolved=resolved, init_new_workspace=init_new_workspace)
    slots, config = late_slots_of(model_runner.req_to_token_pool), config_of(model_runner.server_args)
    children, translators = [early], []
    for _ in range(config.row_kinds):
        runner = LateRunner(model_runner, slots.table)
        with startup_time.counted("late attention"):
            children.append(original(model_runner=runner, resolved=resolved, init_new_workspace=init_new_workspace))
        translators.append(runner.kv_index_translator)
    device = torch.device(model_runner.device) if model_runner.server_args.enable_metrics else None
    stages = attached.stages.hang(model_runner.req_to_token_pool, StageTimes(device))
    return ClaaAttnBackend(children, translators, slots, config, model_ranks(), stages)


HOOKS = (
    Hook(
        "sglang.srt.model_executor.model_runner_components.attention_backend_setup._build_resolved_backend",
        ("model_runner", "resolved", "init_new_workspace"),
        "around",
        build_composite,
        "scheduler",
        "Late layers need a second instance of whatever attention backend SGLang resolved.",
    ),
)
