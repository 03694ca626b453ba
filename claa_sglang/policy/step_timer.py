"""Times of prefill steps for the cost model."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from claa_sglang.policy.cost import CostModel, Work
from claa_sglang.policy.device_timer import DeviceTimer


class Step:
    """One forward. work: what it did; none teaches nothing."""

    work = Work()


class StepTimer:
    """Feeds a cost model with what forwards took on this device."""

    def __init__(self, cost: CostModel, device: torch.device) -> None:
        self._timer: DeviceTimer[Step] = DeviceTimer(device, lambda step, seconds: cost.observe(step.work, seconds))

    def step(self) -> AbstractContextManager[Step]:
        """Around one forward; what it did is to be set before the end. One that raises is not counted."""
        return self._timer.around(Step())

    def collect(self) -> None:
        """Hand on the steps that the device has finished."""
        self._timer.collect()
