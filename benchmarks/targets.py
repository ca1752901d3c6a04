"""What the sparse layers are to reach: ratios of times in one run, one thread unless said.

A target is a row of the table per shape: by how much ours is to be faster than the best of `peers`,
at each sparsity. `shapes` holds the share of the table that a shape is to reach: a small layer's
fixed costs weigh more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
# In every cell: not slower than this times dense, or than this many milliseconds over it where
# the dense call takes less than `SHORT_CALL_MS`.
NEVER_SLOWER, SHORT_CALL_MS, SHORT_CALL_EXTRA_MS = 0.97, 1.0, 0.025
# A new mask's index, by shape; and never more than one forward of 128 samples at its sparsity.
REBUILD_MS = {"2048x2048": 2.0, "4096x4096": 8.0}
TWO_THREADS = 1.8
VGG_SHARE_OF_CEILING = 0.8

LINEAR_SHAPES = {
    "128x2048x2048": 1.0,
    "256x768x3072": 1.0,
    "2048x768x3072": 1.0,
    "256x4096x4096": 1.0,
    "512x1024x1024": 0.9,
    "128x512x256": 0.6,
}
HALF_SHAPES = {name: share for name, share in LINEAR_SHAPES.items() if share == 1.0}
CONV_SHAPES = {
    "16x64c56-3x3": 1.0,
    "16x128c28-3x3": 1.0,
    "16x256c14-3x3": 1.0,
    "16x512c7-3x3": 1.0,
    "16x64c32-3x3": 1.0,
    "16x256c8-3x3": 0.8,
    "64x256c8-3x3": 0.8,
    "16x512c4-3x3": 0.8,
    "64x512c4-3x3": 0.8,
}


@dataclass(frozen=True)
class Target:
    """Rows of the table: `ratios` is read beside `SPARSITIES`, None where nothing is asked."""

    name: str
    op: str
    peers: tuple[str, ...]
    shapes: Mapping[str, float]
    ratios: tuple[float | None, ...]
    mode: str = "forward_backward"
    dtype: str = "float32"
    ours: str = "ours, values"

    def at(self, shape: str, sparsity: float) -> float | None:
        """What this shape is to reach at a sparsity, or None."""
        ratio = dict(zip(SPARSITIES, self.ratios, strict=True)).get(sparsity)
        return None if ratio is None else ratio * self.shapes[shape]


VGG = "vgg-16-b32"
TRAIN_SHAPES = ("mlp-2048-b128", "lenet-300-100-b128", VGG, "resnet-18-b16", "wrn-28-4-b16")
SINGLE = {"1x4096x4096": 1.0}
SPARSEPROP_CONV = ("SparseProp over batch", "SparseProp over width")
# fmt: off
TABLE = (
    Target("linear vs dense", "masked_linear", ("F.linear",), LINEAR_SHAPES,
           (1.6, 2.5, 3.5, 6, 11, 22, 32, 55)),
    Target("linear vs SparseProp", "masked_linear", ("SparseProp",), LINEAR_SHAPES,
           (2.9, 3.0, 3.0, 2.7, 2.7, 2.9, 3.0, 3.5)),
    Target("linear vs torch.sparse.mm", "masked_linear", ("torch.sparse.mm CSR",), LINEAR_SHAPES,
           (None, None, 5, 5, 5.3, 5, 4.4, 4)),
    Target("bf16 forward vs dense bf16", "masked_linear", ("F.linear",), HALF_SHAPES,
           (0.97, 1.3, 2.0, 3.8, 7, 14, 20, 35), "forward", "bfloat16"),
    Target("conv 3x3 vs dense", "masked_conv2d", ("F.conv2d",), CONV_SHAPES,
           (1.0, 1.5, 2.4, 4.5, 8, 14, 20, 40)),
    Target("conv 3x3 vs SparseProp", "masked_conv2d", SPARSEPROP_CONV, CONV_SHAPES,
           (None, None, 2.4, 2.5, 2.5, 2.2, 2.0, 2.0)),
    Target("batch 1 vs dense", "masked_linear", ("F.linear",), SINGLE,
           (None, 1.7, 2.5, 4.6, 8.8, 22, 45, None), "forward"),
    Target("batch 1 vs MKL CSR", "masked_linear", ("MKL CSR, feature-major",), SINGLE,
           (None, None, 4, 3.4, 2.8, 2.7, 2.7, None), "forward"),
    Target("PGD-10 step vs dense-masked", "train_step", ("dense, masked",),
           {"mlp-2048-b128": 1.0, VGG: 8 / 15},
           (None, None, None, None, None, None, 15, None), "pgd10_step", ours="ours"),
)
# fmt: on
# Shown without a target: what else a reader asks.
INFORMATION = (
    Target(
        "linear, dense weight vs dense",
        "masked_linear",
        ("F.linear",),
        LINEAR_SHAPES,
        (None,) * 8,
        ours="ours, dense weight",
    ),
    Target(
        "bf16 forward vs dense in fp32",
        "masked_linear",
        ("F.linear in fp32",),
        HALF_SHAPES,
        (None,) * 8,
        "forward",
        "bfloat16",
    ),
    Target(
        "PGD-10 step vs dense-masked",
        "train_step",
        ("dense, masked",),
        dict.fromkeys([s for s in TRAIN_SHAPES[1:] if s != VGG], 1.0),
        (None,) * 8,
        "pgd10_step",
        ours="ours",
    ),
    Target(
        "PGD-10 step vs SparseProp",
        "train_step",
        ("SparseProp",),
        dict.fromkeys(TRAIN_SHAPES, 1.0),
        (None,) * 8,
        "pgd10_step",
        ours="ours",
    ),
)
DENSE = {"masked_linear": "F.linear", "masked_conv2d": "F.conv2d"}
