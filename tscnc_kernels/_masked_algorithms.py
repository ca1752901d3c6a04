"""Which algorithm computes each product of a masked layer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _autotune, _backend, _masked_cuda
from tscnc_kernels._autotune import DENSE, Compute, Plan
from tscnc_kernels._block_index import SMALLEST_EDGE, edge_of
from tscnc_kernels._build import C
from tscnc_kernels._masked_semi_structured import SEMI_STRUCTURED, why_not
from tscnc_kernels.sparsity import SparsityPattern

DIRECTIONS = ("forward", "grad_input", "grad_weight")
# The decision between one pass for both gradients, by the algorithm of that name, and a pass each.
BACKWARD, SEPARATE = "backward", "separate"
BLOCK = "block"


class Cost(NamedTuple):
    """Nanoseconds of an algorithm on one core, as fitted to benchmarks/results/cpu-*-avx2.

    Attributes:
        product: per entry that it multiplies, and sample.
        sample: per element of its input and output, for the layout.
        entry: per entry, whatever the batch.
        call: per call.
        batches: the smallest and the largest batch that it runs on.
        grid: per entry of the dense weight, and sample.
        both: as `product`, of both gradients in one pass; 0 where it makes one for each.
    """

    product: float
    sample: float
    entry: float
    call: float
    batches: tuple[int, int] = (0, 1 << 62)
    grid: float = 0.0
    both: float = 0.0


class Family(NamedTuple):
    """The algorithms of one op.

    Attributes:
        sparse: the native backend's, with their codes in csrc/<op>.cpp.
        costs: of all that the closed-form model knows, dense too.
        usual: the shape of a usual weight.
    """

    sparse: Mapping[str, int]
    costs: Mapping[str, Cost]
    usual: tuple[int, ...]


FAMILIES = {
    "masked_linear": Family(
        {"panel": 0, "blocked": 1, "small_batch": 2, "spmv": 3, "block": 4},
        {
            "panel": Cost(0.058, 0.6, 0.6, 6e3, both=0.105),
            "blocked": Cost(0.036, 0.6, 1.5, 8e3, (17, 1 << 62), 0.0008),
            "small_batch": Cost(0.02, 0.6, 0.7, 6e3, (2, 16)),
            "spmv": Cost(0.0, 0.6, 0.75, 6e3, (1, 1)),
            "block": Cost(0.04, 0.6, 0.8, 6e3, (17, 1 << 62)),
            DENSE: Cost(0.027, 0.02, 0.2, 6e3),
        },
        (1024, 1024),
    ),
    "masked_conv2d": Family(
        {"plane": 0, "batch": 1, "direct": 2},
        {
            "plane": Cost(0.058, 0.5, 0.6, 1e4, both=0.105),
            "batch": Cost(0.058, 0.5, 0.6, 1e4, both=0.105),
            "direct": Cost(0.068, 0.25, 0.6, 1e4, both=0.125),
            DENSE: Cost(0.025, 0.1, 0.2, 1e4),
        },
        (256, 256, 3, 3),
    ),
}
SPARSE = FAMILIES["masked_linear"].sparse
ALGORITHMS = (*SPARSE, DENSE)
# Nanoseconds per kept entry to pick it from a dense weight or put it there, and per entry of a
# dense weight to fill or mask it; and of a call that does one of these.
PICK, FILL, MOVE_CALL = 3.0, 0.25, 7e3


class Algorithms(NamedTuple):
    """The algorithm of each of a layer's three products."""

    forward: str
    grad_input: str
    grad_weight: str

    def pick(self, direction: str, compute: Compute, tensors: Sequence[Tensor]) -> str:
        """As `Plan.pick`, where everything is decided."""
        if direction == BACKWARD:
            return self.grad_input if self.grad_input == self.grad_weight else SEPARATE
        return self[DIRECTIONS.index(direction)]


class Call(NamedTuple):
    """What a masked product's time depends on, beside the pattern.

    Attributes:
        batch: samples; of a convolution, output pixels of all images.
        values: the weight comes as its kept entries.
        held: a dense weight is zero off the mask already.
        dtype: of all tensors.
        layout: of the input, "rows", "features" or "strided", and of a feature-major output.
        detail: of the op, such as a convolution's stride.
    """

    batch: int
    values: bool = False
    held: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "rows"
    detail: str = ""

    @classmethod
    def of(cls, input: Tensor, weight: Tensor, held: bool, feature_major: bool = False) -> "Call":
        """The call of a linear layer on a matrix of samples."""
        layout = "rows"
        if not input.is_contiguous():
            layout = "features" if input.stride(0) == 1 else "strided"
        if feature_major:
            layout += " to features"
        return cls(input.shape[0], weight.dim() == 1, held, input.dtype, layout)


def usual_call(shape: Sequence[int], values: bool = True) -> Call:
    """A call to plan for where none has been seen: 128 samples, or 4096 pixels."""
    return Call(128 if len(shape) == 2 else 4096, values)


def predict(
    op: str,
    shape: Sequence[int],
    nnz: int,
    call: Call,
    direction: str,
    blocks: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Seconds of each algorithm that can compute a direction natively on nnz kept entries.

    For "backward", of each that computes both gradients in one pass, and of "separate" passes. All
    of one thread, so that the choice, and with it the bits, are the same for any number of them.
    `blocks` is the pattern's block_shape.
    """
    if direction == BACKWARD:
        return _predict_backward(op, shape, nnz, call, blocks)
    size, elements = math.prod(shape), call.batch * (shape[0] + shape[1])
    seconds = {}
    for name, cost in FAMILIES[op].costs.items():
        if not cost.batches[0] <= call.batch <= cost.batches[1]:
            continue
        if name == "block" and not _uses_blocks(direction, blocks):
            continue
        entries = size if name == DENSE else nnz
        work = (cost.product * call.batch + cost.entry) * entries + cost.sample * elements
        work += cost.grid * call.batch * size
        if name == DENSE:
            work += _around_dense(call, direction, nnz, size)
        elif not call.values:
            work += PICK * nnz + (FILL * size if direction == "grad_weight" else 0)
        seconds[name] = 1e-9 * (work * call.dtype.itemsize / 4 + cost.call)
    return seconds


def _predict_backward(
    op: str, shape: Sequence[int], nnz: int, call: Call, blocks: tuple[int, int] | None
) -> dict[str, float]:
    each = [predict(op, shape, nnz, call, direction, blocks) for direction in DIRECTIONS[1:]]
    seconds = {SEPARATE: sum(min(times.values()) for times in each)}
    for name, cost in FAMILIES[op].costs.items():
        if cost.both and cost.batches[0] <= call.batch <= cost.batches[1]:
            saved = 2 * cost.product - cost.both
            entries, elements = nnz * call.batch, call.batch * (shape[0] + shape[1])
            work = (saved * entries + cost.sample / 2 * elements) * call.dtype.itemsize / 4
            seconds[name] = sum(times[name] for times in each) - 1e-9 * (work + cost.call)
    return seconds


def predict_step(op: str, shape: Sequence[int], nnz: int, call: Call) -> float:
    """Seconds of the forward product and both gradients, each by the fastest way."""
    ways = "forward", BACKWARD
    return sum(min(predict(op, shape, nnz, call, way).values()) for way in ways)


def _uses_blocks(direction: str, blocks: tuple[int, int] | None) -> bool:
    """Whether four rows of the product's matrix share their columns."""
    if blocks is None or direction == "grad_weight":
        return False
    return direction == "forward" or blocks[1] >= 4


def _around_dense(call: Call, direction: str, nnz: int, size: int) -> float:
    """Nanoseconds of what the dense algorithm does beside its product."""
    if call.values:
        return MOVE_CALL + PICK * nnz + (FILL * size if direction != "grad_weight" else 0)
    return 0 if call.held and direction != "grad_weight" else MOVE_CALL + FILL * size


Choice = Algorithms | Plan
Model = Callable[..., dict[str, float]]  # with the arguments of `predict`


def choose(
    op: str, pattern: SparsityPattern, backend: str, call: Call | None, forced: str | None = None
) -> Choice:
    """What an op runs: the algorithm asked for, else the fastest by measurement or prediction.

    Where the call cannot be known, as under compilation (None), the prediction for a usual layer of
    the pattern's density decides: a graph must not depend on sizes.

    Raises:
        RuntimeError: a sparse algorithm was asked for on a backend without it.
    """
    if call is not None:
        return plan_for(op, pattern, backend, call, forced)
    check_forced(op, pattern, backend, forced)
    forced = DENSE if forced == SEMI_STRUCTURED else forced
    if forced is not None or backend != "native":
        return Algorithms(*[forced or DENSE] * 3)
    # A graph would build the index of "blocked" anew on every call.
    ranges = _ranges(op, "" if pattern.is_blocked else "blocked", pattern.device.type)
    forward, *gradients, both = (_below(pattern.density, limits) for limits in ranges)
    return Algorithms(forward, *(gradients if both == SEPARATE else [both, both]))


@torch.compiler.assume_constant_result
def _ranges(op: str, without: str, device_type: str) -> list[list[tuple[float, str]]]:
    """Per direction, up to which density each algorithm but one is the fastest of a usual call."""
    shape = FAMILIES[op].usual
    found = []
    for direction in (*DIRECTIONS, BACKWARD):
        ranges: list[tuple[float, str]] = []
        for step in range(1, 201):
            nnz = round(step / 200 * math.prod(shape))
            times = _on(device_type, predict)(op, shape, nnz, usual_call(shape), direction)
            for name in (without, _masked_cuda.EPILOGUE):  # a graph launches no Triton kernel
                times.pop(name, None)
            name = _autotune.fastest(times)
            if ranges and ranges[-1][1] == name:
                ranges.pop()
            ranges.append((step / 200, name))
        found.append(ranges)
    return found


def _on(device_type: str, model: Model) -> Model:
    return _masked_cuda.predict if device_type == "cuda" else model


def _below(density: float, ranges: Sequence[tuple[float, str]]) -> str:
    for limit, name in ranges:
        if density <= limit:
            return name
    return ranges[-1][1]


def check_forced(op: str, pattern: SparsityPattern, backend: str, forced: str | None) -> None:
    """Raises RuntimeError if a sparse algorithm is asked for on a backend without it."""
    if forced == SEMI_STRUCTURED:
        reason = why_not(pattern, backend)
        if reason is not None:
            raise RuntimeError(f"{op}: algorithm {forced!r} cannot run here: {reason}")
        return
    portable, runnable = FAMILIES[op].sparse, _masked_cuda.sparse_of(op)
    if forced not in {*portable, *runnable}:
        return
    on_cuda = pattern.device.type == "cuda"
    if forced == BLOCK and (backend == "triton" or (backend == "native" and on_cuda)):
        _check_blocks(op, pattern)
        return
    if backend != "native":
        raise RuntimeError(
            f"{op}: algorithm {forced!r} needs the native backend, got {backend!r} "
            f"on {pattern.device}"
        )
    if not on_cuda and forced not in portable:
        raise RuntimeError(f"{op}: algorithm {forced!r} needs a GPU, got {pattern.device}")
    if on_cuda and forced not in runnable:
        known = ", ".join([*runnable, *([BLOCK] if op == "masked_linear" else [])])
        raise RuntimeError(f"{op}: expected algorithm {known} or dense on CUDA, got {forced!r}")


def _check_blocks(op: str, pattern: SparsityPattern) -> None:
    reason = _backend.why_no_triton(pattern.device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: algorithm {BLOCK!r} cannot run here: {reason}")
    if edge_of(pattern.block_shape) is None:
        raise RuntimeError(
            f"{op}: algorithm {BLOCK!r} needs a pattern of blocks of {SMALLEST_EDGE}x"
            f"{SMALLEST_EDGE} or larger here, got block_shape {pattern.block_shape}"
        )


def _blocks_of(pattern: SparsityPattern) -> tuple[int, int] | None:
    """The pattern's block_shape where an algorithm makes use of it."""
    device = pattern.device.type
    if len(pattern.shape) != 2 or (device != "cpu" and _backend.why_no_triton(device) is not None):
        return None
    return pattern.block_shape


def batch_bucket(batch: int) -> int:
    """The same number for batches that share a decision: each up to 16, then the octaves."""
    return batch if batch <= 16 else 12 + batch.bit_length()


def _usual_batch(batch: int) -> int:
    """One batch of the bucket of a batch."""
    return batch if batch <= 16 else 3 << batch.bit_length() - 2


def density_bucket(density: float) -> int:
    """The same number for densities that share a decision.

    Steps of 0.025 from 0.1 up, and of a third of an octave below; usual sparsities lie inside one,
    not on its edge.
    """
    if density >= 0.09:
        return round(40 * density)
    return round(3 * math.log2(max(density, 1e-9)))


def plan_for(
    op: str,
    pattern: SparsityPattern,
    backend: str,
    call: Call,
    forced: str | None = None,
    model: Model = predict,
) -> Plan:
    """The plan of one kind of call on a pattern; the pattern keeps it.

    `model` predicts, with the arguments of `predict`.

    Raises:
        RuntimeError: a sparse algorithm was asked for on a backend without it.
    """
    plans = pattern.__dict__.setdefault("_plans", {})
    threads, bucket = torch.get_num_threads(), batch_bucket(call.batch)
    lookup = op, backend, forced, _autotune.is_on(), threads, bucket, call[1:]
    plan: Plan | None = plans.get(lookup)
    if plan is None:
        check_forced(op, pattern, backend, forced)
        plan = plans[lookup] = _new_plan(op, pattern, backend, call, forced, model)
    return plan


def plans_of(pattern: SparsityPattern) -> list[Plan]:
    """The plans of all calls that the pattern has seen, oldest first."""
    return list(pattern.__dict__.get("_plans", {}).values())


def _new_plan(
    op: str,
    pattern: SparsityPattern,
    backend: str,
    call: Call,
    forced: str | None,
    model: Model,
) -> Plan:
    blocks = _blocks_of(pattern) if backend != "reference" else None
    if backend != "native":
        only = DENSE if backend == "reference" or edge_of(blocks) is None else BLOCK
        return Plan(call, op, lambda direction: {only: math.inf}, forced)
    weight = "values" if call.values else "held" if call.held else "dense"
    device = pattern.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else C.active_isa()
    parts = [
        *(op, where, f"t{torch.get_num_threads()}", str(call.dtype).removeprefix("torch.")),
        *("x".join(map(str, pattern.shape)), f"b{batch_bucket(call.batch)}"),
        *(f"d{density_bucket(pattern.density)}", weight, call.layout, call.detail),
    ]
    # Predicted for the middle of the bucket: the first batch that happens to come must not matter.
    # A plan must not hold the pattern that holds it: cycles keep memory until the next collection.
    case = op, pattern.shape, pattern.nnz, call._replace(batch=_usual_batch(call.batch))
    if device.type == "cuda" and edge_of(blocks) is not None:
        parts.append(f"k{edge_of(blocks)}")
    model = _on(device.type, model)
    if forced == SEMI_STRUCTURED:  # a candidate, not an order: dense runs unless it is slower
        forced, model = None, _masked_cuda.predict_race
        parts.append(SEMI_STRUCTURED)
    return Plan(call, "/".join(parts), lambda direction: model(*case, direction, blocks), forced)
