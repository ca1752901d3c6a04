"""Sparse-masked matmul, extreme singular values and penalties for highly pruned networks, as torch
ops.
"""

from tscnc_kernels import nn
from tscnc_kernels._backend import available_backends, use_backend
from tscnc_kernels._build import build_info
from tscnc_kernels.nn.sparsify import explain
from tscnc_kernels.ops.masked_linear import masked_linear
from tscnc_kernels.ops.transformed_l1 import transformed_l1, transformed_l1_value_and_grad
from tscnc_kernels.sparsity import SparsityPattern

__version__: str = build_info()["version"]

__all__ = [
    "SparsityPattern",
    "available_backends",
    "build_info",
    "explain",
    "masked_linear",
    "nn",
    "transformed_l1",
    "transformed_l1_value_and_grad",
    "use_backend",
]
