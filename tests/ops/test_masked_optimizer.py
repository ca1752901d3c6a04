import math

import pytest
import torch

from tests.op_suite import TOLERANCES, check_close
from tscnc_kernels import SparsityPattern, masked_adamw_step, masked_sgd_step

BACKENDS = ["native", "reference"]
SIZES = [(1, 1), (63, 5), (7, 129), (131, 67)]


def pattern_of(shape, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SparsityPattern.from_mask(torch.rand(shape, generator=generator) < density)


def masked_problem(dtype=torch.float32):
    """Weights with patterns of several densities, a convolution's, and whole tensors."""
    patterns = [pattern_of(shape, d) for shape, d in zip(SIZES, (1.0, 0.1, 0.5, 0.03), strict=True)]
    patterns += [pattern_of((6, 3, 3, 3), 0.2), pattern_of((5, 9), 0.0), None, None, None]
    shapes = [p.shape for p in patterns if p is not None] + [(67,), (3, 0), (2, 3, 5)]
    params = [torch.randn(shape).to(dtype) for shape in shapes]
    return params, patterns


def state_like(params, patterns):
    pairs = zip(params, patterns, strict=True)
    return [torch.zeros_like(p) if m is None else p.new_zeros(m.nnz) for p, m in pairs]


def torch_steps(kind, params, patterns, gradients, dtype, **options):
    """torch.optim's result on the kept entries, in `dtype`."""
    masks = [
        torch.ones_like(p).bool() if m is None else m.mask
        for p, m in zip(params, patterns, strict=True)
    ]
    twins = [torch.nn.Parameter(p[mask].to(dtype)) for p, mask in zip(params, masks, strict=True)]
    optimizer = getattr(torch.optim, kind)(twins, foreach=False, **options)
    for grads in gradients:
        for twin, grad, mask in zip(twins, grads, masks, strict=True):
            twin.grad = grad[mask].to(dtype)
        optimizer.step()
    return masks, [twin.detach() for twin in twins]


def run_sgd(params, patterns, gradients, backend, **options):
    buffers = state_like(params, patterns) if options.get("momentum") else []
    for index, grads in enumerate(gradients):
        masked_sgd_step(
            params, grads, buffers, patterns, first_step=index == 0, backend=backend, **options
        )


def run_adamw(params, patterns, gradients, backend, amsgrad=False, **options):
    moments = [state_like(params, patterns) for _ in range(2)]
    maxima = state_like(params, patterns) if amsgrad else []
    steps = [torch.zeros(()) for _ in params]
    for grads in gradients:
        masked_adamw_step(
            params, grads, *moments, maxima, steps, patterns, backend=backend, **options
        )
    assert [step.item() for step in steps] == [len(gradients)] * len(params)


SGD = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "maximize": True},
}
ADAM = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.7), "eps": 1e-3},
    "amsgrad": {"amsgrad": True, "betas": (0.6, 0.8)},
    "maximize": {"maximize": True, "weight_decay": 0.2},
}
CASES = [("SGD", name, options) for name, options in SGD.items()]
CASES += [("AdamW", name, options) for name, options in ADAM.items()]
CASES += [("Adam", name, options) for name, options in ADAM.items()]


def check_against_torch(kind, options, dtype, backend, tolerance):
    params, patterns = masked_problem(dtype)
    before = [p.clone() for p in params]
    gradients = [[torch.randn(p.shape).to(dtype) for p in params] for _ in range(3)]
    options = {"lr": 0.05, "weight_decay": 0.0, **options}
    masks, expected = torch_steps(kind, params, patterns, gradients, torch.float64, **options)
    if kind == "SGD":
        run_sgd(params, patterns, gradients, backend, **options)
    else:
        decoupled = kind == "AdamW"
        run_adamw(params, patterns, gradients, backend, decoupled_weight_decay=decoupled, **options)
    kept = torch.cat([param[mask] for param, mask in zip(params, masks, strict=True)])
    check_close(kept, torch.cat(expected), tolerance, f"{kind} {options}")
    for param, was, mask in zip(params, before, masks, strict=True):
        assert torch.equal(param[~mask], was[~mask])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "name", "options"), CASES, ids=[f"{k}-{n}" for k, n, _ in CASES])
def test_steps_are_those_of_torch(kind, name, options, backend):
    check_against_torch(kind, options, torch.float32, backend, 2e-6)
    check_against_torch(kind, options, torch.float64, backend, 1e-12)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_every_instruction_set_and_dtype_agrees(kind, isa):
    options = SGD["nesterov"] if kind == "SGD" else ADAM["amsgrad"]
    for dtype, tolerance in TOLERANCES.items():
        # Parameter and state are rounded to the half type after each of the three steps.
        rounding = 4 if dtype.itemsize == 2 else 1
        check_against_torch(kind, options, dtype, "native", rounding * tolerance)


def test_hand_worked_sgd():
    param = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    pattern = SparsityPattern.from_mask(torch.tensor([[True, False], [False, True]]))
    grad = torch.tensor([[10.0, 99.0], [99.0, -20.0]])
    buffer = torch.tensor([2.0, 4.0])
    masked_sgd_step([param], [grad], [buffer], [pattern], lr=0.1, momentum=0.5)
    assert buffer.tolist() == [11.0, -18.0]
    assert param.flatten().tolist() == pytest.approx([1 - 1.1, 2.0, 3.0, 4 + 1.8])


def test_hand_worked_adamw():
    # The first step divides the gradient by its size: each kept weight moves by lr.
    param = torch.tensor([[1.0, 2.0, 3.0]])
    pattern = SparsityPattern.from_mask(torch.tensor([[True, False, True]]))
    grad = torch.tensor([[4.0, math.nan, -9.0]])
    moments = torch.zeros(2), torch.zeros(2)
    step = torch.zeros(())
    masked_adamw_step(
        [param], [grad], [moments[0]], [moments[1]], [], [step], [pattern], lr=0.5, weight_decay=0.2
    )
    assert param.flatten().tolist() == pytest.approx([0.9 - 0.5, 2.0, 2.7 + 0.5])
    assert moments[0].tolist() == pytest.approx([0.4, -0.9])
    assert moments[1].tolist() == pytest.approx([0.016, 0.081])
    assert step.item() == 1


def test_amsgrad_keeps_a_nan():
    param, grad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    maxima = torch.tensor([math.nan, 0.0, 0.0])
    state = [torch.zeros(3)], [torch.zeros(3)], [maxima], [torch.zeros(())]
    masked_adamw_step([param], [grad], *state, [None], lr=0.1)
    assert maxima.isnan().tolist() == [True, True, False]
    assert param.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("masked", [False, True])
def test_any_memory_order(masked):
    pattern = pattern_of((8, 6, 3, 3), 0.3) if masked else None
    start, gradient = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for grad_layout in (torch.contiguous_format, torch.channels_last):
            param = start.clone(memory_format=layout)
            grad = gradient.clone(memory_format=grad_layout)
            state = torch.zeros(pattern.nnz) if masked else torch.zeros_like(param)
            for first in (True, False):
                options = {"lr": 0.1, "momentum": 0.9, "first_step": first}
                masked_sgd_step([param], [grad], [state], [pattern], **options)
            assert param.is_contiguous(memory_format=layout)
            results.append((param, state))
    for param, state in results[1:]:
        assert torch.equal(param, results[0][0])
        assert torch.equal(state, results[0][1])


def test_views_of_a_wider_tensor_are_stepped_in_place():
    wide = torch.full((4, 6), 7.0)
    masked_sgd_step([wide[:, ::2]], [torch.ones(4, 3)], [], [None], lr=1.0)
    assert torch.equal(wide[:, ::2], torch.full((4, 3), 6.0))
    assert torch.equal(wide[:, 1::2], torch.full((4, 3), 7.0))


def test_same_bits_for_any_thread_count():
    shape = (700, 400)
    pattern, start, gradient = pattern_of(shape, 0.4), torch.randn(shape), torch.randn(shape)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = [start.clone(), start.clone()]
            run_adamw(params, [pattern, None], [[gradient, gradient]] * 2, "native", lr=0.1)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for params in results[1:]:
        assert all(map(torch.equal, params, results[0]))


def test_autograd_sees_the_change():
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    masked_sgd_step([weight], [torch.ones(3)], [], [None], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def raw_calls():
    pattern = pattern_of((5, 7), 0.4)
    whole = torch.empty(0, dtype=torch.int32)
    index = [pattern.row_pointers, whole], [pattern.columns, whole]

    def state():
        return [torch.rand(pattern.nnz), torch.rand(3)]

    params, grads = [torch.randn(5, 7), torch.randn(3)], [torch.randn(5, 7), torch.randn(3)]
    ops = torch.ops.tscnc_kernels
    steps = [torch.ones(()), torch.ones(())]
    sgd = 0.1, 0.9, 0.0, 0.1, False, False, False
    adamw = 0.1, 0.9, 0.99, 1e-8, 0.1, True, False
    return [
        (ops.masked_sgd_step.default, (params, grads, state(), *index, *sgd)),
        (
            ops.masked_adamw_step.default,
            (params, grads, state(), state(), [], steps, *index, *adamw),
        ),
        (
            ops.masked_adamw_step.default,
            (params, grads, state(), state(), state(), steps, *index, *adamw),
        ),
    ]


@pytest.mark.parametrize("call", range(3))
def test_opcheck(call):
    op, args = raw_calls()[call]
    torch.library.opcheck(op, args)


def test_raw_op_refuses_what_would_reach_outside_of_memory():
    op, (params, grads, buffers, pointers, columns, *rest) = raw_calls()[0]
    outside = columns[0].clone()
    outside[-1] = 7
    with pytest.raises(RuntimeError, match="columns from 0 to 6"):
        op(params, grads, buffers, pointers, [outside, columns[1]], *rest)
    with pytest.raises(RuntimeError, match="lists of 2 tensors"):
        op(params, grads[:1], buffers, pointers, columns, *rest)
    with pytest.raises(RuntimeError, match="a state to be 3 contiguous entries"):
        op(params, grads, [buffers[0], torch.rand(2)], pointers, columns, *rest)
    with pytest.raises(RuntimeError, match="a gradient to be 3 contiguous entries"):
        op(params, [grads[0], grads[1].double()], buffers, pointers, columns, *rest)


X, PATTERN = torch.zeros(2, 3), pattern_of((2, 3), 0.5)


@pytest.mark.parametrize(
    ("params", "grads", "buffers", "patterns", "options", "error", "message"),
    [
        ([], [], [], [], {}, ValueError, "at least one tensor in params"),
        (X, [X], [], [None], {}, TypeError, "params to be a list of tensors, got Tensor"),
        ([X], [X, X], [], [None], {}, ValueError, "got 2 for 1 parameters"),
        ([X], X, [], [None], {}, TypeError, "grads to be a list, got Tensor"),
        ([X], [X.t()], [], [None], {}, ValueError, r"grads\[0\] of shape \(2, 3\), got \(3, 2\)"),
        ([X], [X.double()], [], [None], {}, TypeError, "float32, got torch.float64"),
        ([X], [X.to_sparse()], [], [None], {}, ValueError, r"grads\[0\] to be strided"),
        ([X], [X], [X], [PATTERN], {"momentum": 0.9}, ValueError, r"buffers\[0\] of shape \(\d,\)"),
        ([X], [X], [], [X > 0], {}, TypeError, "SparsityPattern or None, got Tensor"),
        ([X[:1]], [X[:1]], [], [PATTERN], {}, ValueError, r"shape \(1, 3\) on cpu"),
        ([X], [X], [], [None], {"lr": -1.0}, ValueError, "<= lr <= 1e.15, got -1.0"),
        ([X], [X], [], [None], {"lr": math.nan}, ValueError, "lr <= 1e.15, got nan"),
        ([X], [X], [], [None], {"lr": "1"}, TypeError, "lr to be a number, got str"),
        ([X], [X], [], [None], {"nesterov": True}, ValueError, "needs momentum and no dampening"),
    ],
)
def test_bad_input_is_named(params, grads, buffers, patterns, options, error, message):
    with pytest.raises(error, match=message):
        masked_sgd_step(params, grads, buffers, patterns, **{"lr": 0.1, **options})


def test_bad_betas_and_steps_are_named():
    state = [[torch.zeros(3)], [torch.zeros(3)], []]
    one = [torch.ones(3)], [torch.ones(3)]
    with pytest.raises(ValueError, match=r"betas\[1\] <= 1, got 1.0"):
        masked_adamw_step(*one, *state, [torch.zeros(())], [None], lr=0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"float64 scalar, got torch.float32 of shape \(1,\)"):
        masked_adamw_step(*one, *state, [torch.zeros(1)], [None], lr=0.1)
    with pytest.raises(RuntimeError, match="got 'cudnn'"):
        masked_adamw_step(*one, *state, [torch.zeros(())], [None], lr=0.1, backend="cudnn")
