"""Mends two faults of Triton 3.6's interpreter for the tests that run under it.

It holds scalars as arrays of one entry, which NumPy from 2.4 on no longer takes as the bound of a
loop; and its matrix product takes the bits of bfloat16 for integers.
"""

import importlib.util
import os
from typing import Any

import numpy as np


def mend() -> None:
    """Does nothing where kernels are compiled, or without Triton."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    dot = interpreter.InterpreterBuilder.create_dot

    def patched_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def as_float(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def patched_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, as_float(a), as_float(b), *rest)

    interpreter._patch_lang_tensor = patched_tensor
    interpreter.InterpreterBuilder.create_dot = patched_dot
