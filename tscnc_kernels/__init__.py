"""Sparse-masked matmul, extreme singular values and penalties for highly pruned networks."""

from tscnc_kernels import nn, optim
from tscnc_kernels._backend import available_backends, use_backend
from tscnc_kernels._build import build_info
from tscnc_kernels._memory import keep_freed_memory
from tscnc_kernels.nn.explain import explain
from tscnc_kernels.nn.spectral_report import spectral_report
from tscnc_kernels.ops.batch_norm_relu import batch_norm_relu
from tscnc_kernels.ops.condition_number_penalty import condition_number_penalty
from tscnc_kernels.ops.conv_singular_values import conv_singular_values
from tscnc_kernels.ops.extreme_singular_values import extreme_singular_values
from tscnc_kernels.ops.gated_transformed_l1 import gated_transformed_l1
from tscnc_kernels.ops.gram_iteration import gram_iteration
from tscnc_kernels.ops.hard_concrete import hard_concrete, hard_concrete_active_probability
from tscnc_kernels.ops.logdet_gram import logdet_gram
from tscnc_kernels.ops.masked_conv2d import masked_conv2d
from tscnc_kernels.ops.masked_linear import masked_linear
from tscnc_kernels.ops.masked_optimizer import masked_adamw_step, masked_sgd_step
from tscnc_kernels.ops.nuclear_norm import nuclear_norm, nuclear_norm_prox
from tscnc_kernels.ops.orthogonality_penalty import orthogonality_penalty
from tscnc_kernels.ops.transformed_l1 import transformed_l1, transformed_l1_value_and_grad
from tscnc_kernels.ops.transformed_l1_prox import transformed_l1_prox
from tscnc_kernels.sparsity import SparsityPattern

__version__: str = build_info()["version"]

__all__ = [
    "SparsityPattern",
    "available_backends",
    "batch_norm_relu",
    "build_info",
    "condition_number_penalty",
    "conv_singular_values",
    "explain",
    "extreme_singular_values",
    "gated_transformed_l1",
    "gram_iteration",
    "hard_concrete",
    "hard_concrete_active_probability",
    "keep_freed_memory",
    "logdet_gram",
    "masked_adamw_step",
    "masked_conv2d",
    "masked_linear",
    "masked_sgd_step",
    "nn",
    "nuclear_norm",
    "nuclear_norm_prox",
    "optim",
    "orthogonality_penalty",
    "spectral_report",
    "transformed_l1",
    "transformed_l1_prox",
    "transformed_l1_value_and_grad",
    "use_backend",
]
