import torch

from tests.op_suite import OpSpec, OpSuite
from tests.ops.test_masked_linear import pattern, reference, sample
from tscnc_kernels import _backend, masked_linear


def blocked(input, *args, backend=None, **kwargs):
    chosen = _backend.select("masked_linear", input.device, backend)
    algorithm = "blocked" if chosen == "native" else None
    return masked_linear(input, *args, backend=backend, algorithm=algorithm, **kwargs)


def raw_calls():
    kept = pattern(5, 7)
    input, weight, bias = torch.randn(4, 7), torch.randn(5, 7), torch.randn(5)
    grad_output, none = torch.randn(4, 5), torch.empty(0, 5)
    ops = torch.ops.tscnc_kernels
    index = kept.row_pointers, kept.blocked_rows
    backward_index = *index, kept.column_pointers, kept.blocked_columns, kept.blocked_permutation
    needs = True, True, True
    return [
        (ops.masked_linear.default, (input, weight, bias, *index, 1, 1, False)),
        (ops.masked_linear.default, (input, kept.gather(weight), None, *index, 2, 1, True)),
        (
            ops.masked_linear_backward.default,
            (grad_output, none, input, weight, *backward_index, 0, 1, 1, *needs),
        ),
        (
            ops.masked_linear_backward.default,
            (grad_output, none, input, kept.gather(weight), *backward_index, 0, 1, 1, *needs),
        ),
    ]


class TestBlockedMaskedLinear(OpSuite):
    spec = OpSpec(
        name="masked_linear",
        public=blocked,
        reference=reference,
        samples={
            "dense_weight": sample((5,), 9, 7, activation="relu"),
            "values": sample((2, 3), 9, 7, values=True, activation="gelu"),
            "blocks": sample((2,), 3, 131, kind="skewed"),
            "tiles": sample((3,), 259, 2, kind="empty_rows"),
            "one": sample((), 1, 1, kind="full"),
            "empty_batch": sample((0,), 5, 4),
            "empty_pattern": sample((3,), 5, 4, kind="none", values=True),
        },
        raw_calls=raw_calls,
        tolerances={torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    )
