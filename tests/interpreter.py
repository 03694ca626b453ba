"""Our Triton kernels in Triton's interpreter, on CPU tensors, with nothing of it left behind.

Triton reads TRITON_INTERPRET when a kernel is decorated, its own `tl.sum` and the like included, and the interpreter
patches `triton.language` for good. SGLang's kernels, imported by other tests of the same process, and server processes,
which inherit the environment, must see none of that. So a kernel module is executed a second time under a private name
with the switch on, its functions run with Triton's own device functions interpreted too, and then every attribute of
`triton.language` is what it was. The environment is never touched.
"""

from __future__ import annotations

import functools
import importlib.util
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# What the interpreter patches, and where the device functions of Triton's library are.
_PATCHED = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)


@functools.cache
def _interpreted(function: JITFunction) -> InterpretedFunction:
    return InterpretedFunction(function.fn)


def _dot(a: Any, b: Any, *rest: Any) -> Any:
    """The interpreter's dot takes the bits of bf16 for integers: give it the same numbers in fp32."""
    return interpreter.InterpreterBuilder.create_dot(interpreter.interpreter_builder, _widened(a), _widened(b), *rest)


def _widened(operand: Any) -> Any:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@contextmanager
def interpreting() -> Iterator[None]:
    """Within, kernels decorated within are interpreted; afterwards Triton is as before."""
    before = [(owner, dict(vars(owner))) for owner in _PATCHED]
    switch, propagate = knobs.runtime.__dict__.get("interpret"), knobs.propagate_env
    try:
        knobs.propagate_env = False
        knobs.runtime.interpret = True
        interpreter.interpreter_builder.create_dot = _dot
        for owner in (tl, tl.standard):
            for name, value in list(vars(owner).items()):
                if isinstance(value, JITFunction):
                    setattr(owner, name, _interpreted(value))
        # A rewritten function finds the interpreter's names in its module; it is rewritten only once.
        for name, value in vars(interpreter).items():
            vars(tl.standard).setdefault(name, value)
        with np.errstate(all="ignore"):  # what is masked away is still computed
            yield
    finally:
        del interpreter.interpreter_builder.create_dot
        for owner, attributes in before:
            for name, value in list(vars(owner).items()):
                if name not in attributes:
                    delattr(owner, name)
                elif value is not attributes[name]:
                    setattr(owner, name, attributes[name])
        if switch is None:
            del knobs.runtime.interpret
        else:
            knobs.runtime.interpret = switch
        knobs.propagate_env = propagate


def load(name: str) -> Any:
    """kernels/`name`.py as a second module, whose functions run interpreted.

    A kernel reached through the module itself, `load("fold").module._fold_kernel`, is interpreted too, but must then be
    launched within `interpreting()`.
    """
    spec = importlib.util.spec_from_file_location(f"interpreted_{name}", KERNELS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with interpreting():
        spec.loader.exec_module(module)
    public: dict[str, Any] = {"module": module}
    for key, value in vars(module).items():
        if isinstance(value, types.FunctionType) and value.__module__ == module.__name__ and not key.startswith("_"):
            public[key] = _within(value)
    return types.SimpleNamespace(**public)


def _within(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with interpreting():
            return function(*args, **kwargs)

    return call
