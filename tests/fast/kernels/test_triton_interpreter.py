"""The interpreter leaves Triton, the environment and our own kernel modules as they were."""

from __future__ import annotations

import os

import pytest
import torch
import triton.language as tl
from triton import knobs
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from claa_sglang.kernels import fold
from tests import interpreter
from tests.fast.kernels.test_triton_fold import run


def _state() -> list[dict]:
    return [dict(vars(owner)) for owner in (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype)]


def test_nothing_is_left_behind() -> None:
    before, environment = _state(), dict(os.environ)
    kernel = interpreter.load("fold")
    assert isinstance(kernel.module._fold_kernel, InterpretedFunction)
    run(kernel, [torch.rand(40)], [40], 7)
    assert _state() == before and dict(os.environ) == environment
    assert isinstance(tl.sum, JITFunction) and isinstance(fold._fold_kernel, JITFunction)
    assert not knobs.runtime.interpret and "TRITON_INTERPRET" not in os.environ


def test_nothing_is_left_behind_after_an_error() -> None:
    before = _state()
    with pytest.raises(RuntimeError, match="inside"), interpreter.interpreting():
        assert knobs.runtime.interpret and isinstance(tl.sum, InterpretedFunction)
        raise RuntimeError("inside")
    assert _state() == before and not knobs.runtime.interpret
