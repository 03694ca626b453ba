"""Everything that CLAA hangs on SGLang's objects, with typed accessors: the one place that spells these names.

| object | attribute | what |
|---|---|---|
| `Req` | `claa` | its `RequestState` |
| `ReqToTokenPool` | `claa_table` | the widened request table, int32 `[R * (steps + 1), context]` |
| `ReqToTokenPool` | `claa_policy` | the live policy of this scheduler |
| `ReqToTokenPool` | `claa_finishing` | the pruned prefixes that are made dense while nothing runs |
| `ReqToTokenPool` | `claa_scorer` | what scores in this scheduler, and why |
| `ReqToTokenPool` | `claa_stages` | times of CLAA's own stages of a prefill |
| `ReqToTokenPool` | `claa_census` | the census of slot owners, when SGLang's check switches ask for it |
| `SchedulerMetricsCollector`, `TokenizerMetricsCollector` | `claa_metrics` | what a process exports of CLAA |
| `TokenizerManager` | `claa_shadows` | the shadow requests of a server process |
| `ReqState` | `claa_drawn` | a request that was drawn to be answered dense as well |
| prefix cache | `claa_window` | observation window in tokens, which a hit must leave to be computed |
| `Scheduler` | `claa_adder` | the prefill adder class made for it |
| `GenerateReqInput` | `_claa_reports` | reports of a streamed response, by choice |

Late slots and the batch plan need no attribute: SGLang has a place for them (`late_slots_of`, `plan_of`). The server's
own record of arguments is a class of ours; what it keeps is in `arguments.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from torch import Tensor

    from claa_sglang.finishing.finishing import Finishing
    from claa_sglang.forward.scorer_choice import Choice
    from claa_sglang.forward.stage_times import StageTimes
    from claa_sglang.memory.census import SlotCensus
    from claa_sglang.requests.report import Report
    from claa_sglang.requests.state import RequestState
    from claa_sglang.shadow.waiting import Shadow

T = TypeVar("T")


class Attached(Generic[T]):
    """One attribute that CLAA sets on objects of SGLang's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find(self, owner: Any) -> T | None:
        """What hangs on `owner`; None if nothing does."""
        return cast("T | None", getattr(owner, self._name, None))

    def of(self, owner: Any) -> T:
        """What hangs on `owner`. Raises AttributeError where nothing does: a hook did not run."""
        return cast(T, getattr(owner, self._name))

    def hang(self, owner: Any, value: T) -> T:
        """Set it, in place of what was there; returns `value`."""
        setattr(owner, self._name, value)
        return value


state: Attached[RequestState] = Attached("claa")
table: Attached[Tensor] = Attached("claa_table")
policy: Attached[Any] = Attached("claa_policy")  # a `LivePolicy`, whose module imports this one: read by `live_policy`
finishing: Attached[Finishing] = Attached("claa_finishing")
metrics: Attached[Any] = Attached("claa_metrics")  # a `SchedulerMetrics` or a `RequestMetrics`
scorer: Attached[Choice] = Attached("claa_scorer")
stages: Attached[StageTimes] = Attached("claa_stages")
shadows: Attached[Any] = Attached("claa_shadows")  # an `OwnShadows`, whose module imports this one
drawn: Attached[Shadow] = Attached("claa_drawn")
census: Attached[SlotCensus] = Attached("claa_census")
window: Attached[int] = Attached("claa_window")
adder: Attached[type[PrefillAdder]] = Attached("claa_adder")
reports: Attached[dict[int, Report]] = Attached("_claa_reports")
