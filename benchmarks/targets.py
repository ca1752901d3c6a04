"""What the sparse layers and the spectral ops are to reach: ratios of times in one run, one thread.

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


@dataclass(frozen=True)
class SpectralTarget:
    """By how much ours is to be faster than the best peer that is as accurate, in one case."""

    name: str
    op: str
    mode: str
    shape: str
    ratio: float | None
    sparsity: float = 0.0
    ours: str = "native"
    dtype: str = "float32"

    @property
    def peers(self) -> tuple[str, ...]:
        """Backends of the case that the ratio is taken to."""
        return SPECTRAL_PEERS[self.op]


# The gate of the benchmarks leaves out what is not accurate, in its own case.
SPECTRAL_PEERS = {
    "extreme_singular_values": ("torch svdvals", "gram32 + eigvalsh", "gram64 + eigvalsh"),
    "conv_spectrum": (
        "full fft + svdvals",
        "half spectrum + svdvals",
        "half, gram64 + eigvalsh",
        "gram iteration",
    ),
    "gram_iteration": (
        "float32 gram iteration",
        "power iteration 50",
        "torch svdvals",
        "gram32 + eigvalsh",
        "torch lobpcg 20",
        "scipy svds ARPACK",
        "scipy svds PROPACK",
    ),
}
_ENDS, _CONV = "extreme_singular_values", "64-64-3x3-on-32"


def _ends(
    shape: str, cold: float | None, warm: float | None, sparsity: float = 0.0
) -> list[SpectralTarget]:
    pruned = f", {100 * sparsity:g} % pruned" if sparsity else ""
    return [
        SpectralTarget(f"both ends{pruned}, {name}", _ENDS, mode, shape, ratio, sparsity)
        for name, mode, ratio in (("cold", "forward", cold), ("warm", "warm", warm))
        if ratio is not None
    ]


SPECTRAL = (
    *_ends("64x576", 2.0, 10),
    *_ends("128x1152", 1.7, 9),
    *_ends("256x2304", 1.8, 14),
    *_ends("512x4608", 2.0, 17),
    *_ends("512x4608", 6.8, 68, 0.95),
    *[
        SpectralTarget("both ends, cold, float64", _ENDS, "forward", n, ratio, dtype="float64")
        for n, ratio in (("256x2304", 2.1), ("512x4608", 2.4))
    ],
    *_ends("512x512", 3.3, 4.3),
    *_ends("2048x2048", 3.0, None),
    *_ends("2048x2048", 5.9, None, 0.95),
    *_ends("4096x4096", 2.7, None),
    *[t for n in ("256x32x32", "64x64x64", "64x128x128") for t in _ends(n, 2.6, 9)],
    *[
        SpectralTarget("sigma_max alone, warm", _ENDS, "warm_max", f"{n}x{n}", ratio)
        for n, ratio in ((512, 85), (2048, 147), (4096, 160))
    ],
    SpectralTarget("log kappa and gradient, cold", _ENDS, "forward_backward", "resnet-18", 5.3),
    SpectralTarget(
        "log kappa and gradient, 95 % pruned", _ENDS, "forward_backward", "resnet-18", 11, 0.95
    ),
    SpectralTarget("log kappa and gradient, warm", _ENDS, "warm_forward_backward", "resnet-18", 37),
    *[
        SpectralTarget(
            f"convolution, {name}", "conv_spectrum", mode, _CONV, ratio, ours="conv_singular_values"
        )
        for name, mode, ratio in (
            ("both ends, cold", "forward", 3.5),
            ("both ends, warm", "warm", 28),
            ("both ends and gradient", "forward_backward", None),
            ("sigma_max", "max", None),
        )
    ],
    *[
        SpectralTarget(
            "Gram iteration", "gram_iteration", "forward", shape, None, ours="gram_iteration"
        )
        for shape in ("64x576", "512x4608", "512x512", "64x64x64")
    ],
)

# Of bench_spectral_errors. Relative errors of sigma_max, cold and warm, and of sigma_min up to each
# power of ten of kappa; share of matrices up to 1e6 that may be flagged; widths of the intervals.
SIGMA_MAX_ERROR = {"ours, cold": 1e-3, "ours, warm": 1e-5}
SIGMA_MIN_ERROR = {6: 1e-3, 7: 1e-2}
SINGULAR_ERROR = 1e-3
CAPPED_SHARE, CAPPED_POWER = 0.01, 6
INTERVAL_WIDTH = {3: 1e-3, 4: 5e-2}
