"""`claa` in /server_info and in `Engine.get_server_info()`: configuration, hooks, and what a server does now.

Late slots and finishing are live numbers of the schedulers, and SGLang's own readback of their state fetches them: each
scheduler adds its own, the server sums them over data-parallel replicas.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from claa_sglang.finishing.finishing import Finishing
from claa_sglang.patches import attached
from claa_sglang.patches.hooks import SUPPORTED_SGLANG, Hook, applied_count
from claa_sglang.requests.report import KEY
from claa_sglang.shadow.counts import Counts
from claa_sglang.start import startup_time
from claa_sglang.start.server_config import config_of

Numbers = dict[str, dict[str, float]]  # of one scheduler, by section
SECTIONS = {"late_slots": ("total", "free", "held"), "finishing": tuple(Finishing().stats())}
# What the last readback found, one item per scheduler. /server_info reads back just before it answers.
_last: list[Numbers] = []
_last_shadow: dict[str, Any] = {}  # likewise, of the server process


def late_slots(scheduler: Any) -> dict[str, int]:
    """KV slots that late layers can take in one scheduler, in tokens, now; zeros if there are none.

    total: the pool, which early KV and cached prefixes share. free: can be taken at once. held: late slots that
    requests hold.
    """
    slots = getattr(scheduler.req_to_token_pool, "_aux_cache", None)
    values = {"total": "total", "free": "free_count", "held": "held"}
    return {name: getattr(slots, attribute, 0) for name, attribute in values.items()}


def finishing_stats(scheduler: Any) -> dict[str, float]:
    """Pruned prefixes of one scheduler that wait to be made dense, were finished and dropped, now; zeros if off."""
    return (attached.finishing.find(scheduler.req_to_token_pool) or Finishing()).stats()


def shadow_stats(manager: Any) -> dict[str, Any]:
    """Of the server of this TokenizerManager: shadow requests that wait, and what became of others; zeros if off."""
    own = attached.shadows.find(manager)
    return {"waiting": 0, **Counts().stats()} if own is None else own.stats()


def add_numbers(output: Any, controller: Any, _recv_req: Any) -> Any:
    """AFTER SchedulerInternalStateController.get_internal_state: `claa` of this scheduler, now."""
    scheduler = controller.scheduler
    output.internal_state[KEY] = {"late_slots": late_slots(scheduler), "finishing": finishing_stats(scheduler)}
    return output


async def remember_numbers(original: Callable[[Any], Awaitable[list[dict]]], manager: Any) -> list[dict]:
    """AROUND TokenizerControlMixin.get_internal_state, which asks every scheduler; returns its answer."""
    states = await original(manager)
    _last[:] = _numbers_in(states)
    _last_shadow.update(shadow_stats(manager))
    return states


def add_to_server_info(result: dict, server_args: Any, scheduler_info: dict) -> dict:
    """AFTER build_server_info (HTTP and gRPC): adds `claa`."""
    result[KEY] = server_entry(server_args, scheduler_info, _last, _last_shadow)
    return result


def add_to_engine_info(result: dict, engine: Any) -> dict:
    """AFTER Engine.get_server_info, which builds its answer itself: adds `claa`."""
    infos = engine._scheduler_init_result.scheduler_infos
    numbers = _numbers_in(result["internal_states"])
    manager = engine.tokenizer_manager
    result[KEY] = server_entry(manager.server_args, infos[0], numbers, shadow_stats(manager))
    return result


def server_entry(
    server_args: Any, scheduler_info: dict, numbers: Iterable[Numbers], shadow: Mapping[str, Any]
) -> dict[str, Any]:
    """The value of `claa`, as JSON values.

    `config`: the resolved configuration. `hooks`: `ok`, and how many rows of the hook table are verified in the server
    and in its scheduler. `startup_seconds`: what CLAA added to the start of each; `startup_parts`: on what.
    `scorer`: what scores in the scheduler and why, with microseconds of one layer where it was measured.
    `late_slots`, `finishing`: as above, over all replicas. `shadow`: what became of shadow requests so far.
    """
    scheduler = scheduler_info.get(KEY) or {}
    parts = {"server": startup_time.parts(), "scheduler": scheduler.get("startup_seconds", {})}
    rows = {"server": applied_count(), "scheduler": scheduler.get("hooks", 0)}
    return {
        "config": config_of(server_args).to_dict(),
        "scorer": scheduler.get("scorer"),
        "hooks": {"ok": all(rows.values()), **rows, "sglang": SUPPORTED_SGLANG},
        **_summed(numbers),
        "shadow": dict(shadow),
        "startup_seconds": {process: round(sum(spent.values()), 3) for process, spent in parts.items()},
        "startup_parts": parts,
    }


def _numbers_in(states: Iterable[dict]) -> list[Numbers]:
    return [state[KEY] for state in states if KEY in state]


def _summed(numbers: Iterable[Numbers]) -> Numbers:
    parts = list(numbers)
    return {
        section: {name: sum(part[section][name] for part in parts) for name in names}
        for section, names in SECTIONS.items()
    }


HOOKS: tuple[Hook, ...] = (
    Hook(
        target=(
            "sglang.srt.managers.scheduler_components.internal_state."
            "SchedulerInternalStateController.get_internal_state"
        ),
        params=("self", "recv_req"),
        kind="after",
        fn=add_numbers,
        process="scheduler",
        reason="free late slots are known in the scheduler only, and this is how a server reads its state",
    ),
    Hook(
        target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.get_internal_state",
        params=("self",),
        kind="around",
        fn=remember_numbers,
        process="server",
        reason="/server_info reads the schedulers' state here, but does not hand it to build_server_info",
    ),
    Hook(
        target="sglang.srt.utils.common.build_server_info",
        params=("server_args", "scheduler_info"),
        kind="after",
        fn=add_to_server_info,
        process="server",
        reason="the /server_info route itself is bound when it is declared; this builds its answer",
    ),
    Hook(
        target="sglang.srt.entrypoints.engine.Engine.get_server_info",
        params=("self",),
        kind="after",
        fn=add_to_engine_info,
        process="server",
        reason="sgl.Engine builds the same answer on its own",
    ),
)
