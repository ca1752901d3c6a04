import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels import SparsityPattern, masked_linear, use_backend
from tscnc_kernels.ops import masked_linear as op

MASKS = ["random", "full", "none", "empty_rows", "empty_columns", "one_row", "skewed", "block"]


def make_mask(kind: str, rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(rows, width, generator=generator)
    mask = noise < 0.2
    if kind == "full":
        mask = torch.ones(rows, width, dtype=torch.bool)
    elif kind == "none":
        mask = torch.zeros(rows, width, dtype=torch.bool)
    elif kind == "empty_rows":
        mask[::2] = False
    elif kind == "empty_columns":
        mask[:, ::3] = False
    elif kind == "one_row":
        mask = torch.zeros(rows, width, dtype=torch.bool)
        mask[rows // 2] = True
    elif kind == "skewed":
        mask = noise < torch.linspace(0, 1, rows)[:, None] ** 4
    elif kind == "block":
        mask = torch.zeros(rows, width, dtype=torch.bool)
        mask[rows // 4 : rows // 2, width // 3 :] = True
    return mask


def pattern(rows: int, width: int, kind: str = "random") -> SparsityPattern:
    return SparsityPattern.from_mask(make_mask(kind, rows, width))


def reference(input, weight, pattern, bias=None, activation="none", *, dense_grad=False, **_):
    return op.reference(
        input, weight, pattern.to(input.device), bias, activation, dense_grad=dense_grad
    )


def sample(batch, rows, width, values=False, kind="random", activation="none", bias=True, **kwargs):
    """The scale keeps outputs of order one, on which the suite's tolerances are stated."""

    def arguments(make):
        kept = pattern(rows, width, kind).to(make(1).device)
        scale = max(1.0, kept.nnz / rows) ** -0.5
        weight = make(kept.nnz) if values else make(rows, width)
        args = (make(*batch, width), weight * scale, kept, make(rows) if bias else None, activation)
        return args, kwargs

    return arguments


def raw_calls():
    kept = pattern(5, 7)
    input, weight, bias = torch.randn(4, 7), torch.randn(5, 7), torch.randn(5)
    grad_output, none = torch.randn(4, 5), torch.empty(0, 5)
    ops = torch.ops.tscnc_kernels
    index = kept.row_pointers, kept.columns
    return [
        (ops.masked_linear.default, (input, weight, bias, *index, 1, 0, False)),
        (ops.masked_linear.default, (input, kept.gather(weight), None, *index, 2, 0, True)),
        (
            ops.masked_linear_backward.default,
            (grad_output, none, input, weight, *kept.tensors[1:], 0, 0, 0, True, True, True),
        ),
        (
            ops.masked_linear_backward.default,
            (
                *(grad_output, grad_output, input, kept.gather(weight), *kept.tensors[1:]),
                *(2, 0, 0, True, True, False),
            ),
        ),
    ]


class TestMaskedLinear(OpSuite):
    spec = OpSpec(
        name="masked_linear",
        public=masked_linear,
        reference=reference,
        samples={
            "dense_weight": sample((5,), 9, 7),
            "values": sample((2, 3), 9, 7, values=True, activation="gelu"),
            "panels": sample((67,), 17, 13, activation="relu"),
            "dense_algorithm": sample((3,), 6, 5, activation="gelu", algorithm="dense"),
            "one": sample((), 1, 1, kind="full"),
            "empty_batch": sample((0,), 5, 4),
            "empty_pattern": sample((3,), 5, 4, kind="none", values=True),
        },
        raw_calls=raw_calls,
        # A gradient of the weight sums 67 products, one of which rounds to 1e-3 of their largest.
        tolerances={torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
    )

    def test_same_bits_every_run_and_for_any_thread_count(self):
        """Of the kernels: torch's GEMM, which wins on some samples, splits sums among threads."""

        def sparse(*args, **kwargs):
            return masked_linear(*args, **{**kwargs, "algorithm": "panel"})

        self.spec = dataclasses.replace(self.spec, public=sparse)
        super().test_same_bits_every_run_and_for_any_thread_count()


def test_hand_worked_forward_and_gradients(isa):
    # W ∘ M = [[2, 0, -1], [0, 0, 0], [0, 3, 0]], x = (1, 2, 3), b = (1, -1, 0.5)
    mask = torch.tensor([[True, False, True], [False, False, False], [False, True, False]])
    weight = torch.tensor([[2.0, 9.0, -1.0], [9.0, 9.0, 9.0], [9.0, 3.0, 9.0]], requires_grad=True)
    input = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    bias = torch.tensor([1.0, -1.0, 0.5], requires_grad=True)
    kept = SparsityPattern.from_mask(mask)
    output = masked_linear(input, weight, kept, bias, algorithm="panel")
    assert output.tolist() == [[0.0, -1.0, 6.5]]
    output.backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert input.grad.tolist() == [[2.0, 300.0, -1.0]]
    assert weight.grad.tolist() == [[1.0, 0.0, 3.0], [0.0, 0.0, 0.0], [0.0, 200.0, 0.0]]
    assert bias.grad.tolist() == [1.0, 10.0, 100.0]
    relu = masked_linear(input, weight, kept, bias, "relu", algorithm="panel")
    assert relu.tolist() == [[0.0, 0.0, 6.5]]


def gradients(function, *tensors):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    output = function(*tensors)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return output.detach(), torch.autograd.grad(output, tensors, weights)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch", [1, 2, 8, 9, 31, 33, 127])
def test_panel_equals_masked_dense_for_every_mask_and_batch(kind, batch, isa):
    kept = pattern(63, 37, kind)
    input, weight, bias = (torch.randn(s).double() for s in ((batch, 37), (63, 37), (63,)))
    expected, wanted = gradients(
        lambda x, w, b: F.gelu(F.linear(x, w * kept.mask, b)), input, weight, bias
    )
    for dense in (True, False):
        held = weight if dense else kept.gather(weight)
        actual, found = gradients(
            lambda x, w, b: masked_linear(x, w, kept, b, "gelu", algorithm="panel"),
            *(input, held, bias),
        )
        check_close(actual, expected, 1e-12, "value")
        check_close(found[0], wanted[0], 1e-12, "input gradient")
        check_close(
            found[1] if dense else kept.scatter(found[1]), wanted[1], 1e-12, "weight gradient"
        )
        check_close(found[2], wanted[2], 1e-12, "bias gradient")


@pytest.mark.parametrize("size", [(1, 1), (63, 1), (1, 129), (129, 63), (131, 257)])
def test_odd_sizes(size, isa):
    kept = pattern(*size)
    input, weight = torch.randn(37, size[1]).double(), torch.randn(size).double()
    expected, wanted = gradients(lambda x, w: F.linear(x, w * kept.mask), input, weight)
    actual, found = gradients(
        lambda x, w: masked_linear(x, w, kept, algorithm="panel"), input, weight
    )
    check_close(actual, expected, 1e-12, "value")
    for a, e in zip(found, wanted, strict=True):
        check_close(a, e, 1e-12, "gradient")


@pytest.mark.parametrize("batch", [5, 40, 300])
def test_same_bits_for_any_thread_count_where_threads_are_used(batch):
    """Few samples are split by rows of the weight, many by panels."""
    kept = pattern(400, 700, "skewed")
    input, weight, bias = torch.randn(batch, 700), torch.randn(400, 700), torch.randn(400)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            output, found = gradients(
                lambda x, w, b: masked_linear(x, w, kept, b, "relu", algorithm="panel"),
                *(input, weight, bias),
            )
            runs.append([output, *found])
    finally:
        torch.set_num_threads(threads)
    check_close(runs[0][0], F.relu(F.linear(input, weight * kept.mask, bias)), 1e-4, "value")
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every_other_column": lambda t: torch.stack([t, t + 1], -1).reshape(t.shape[0], -1)[:, ::2],
    "every_other_row": lambda t: torch.stack([t, t + 1], 1).reshape(-1, t.shape[1])[::2],
    "expanded_rows": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_strides_give_the_same_bits_as_contiguous(layout, dtype, isa):
    kept = pattern(21, 35)
    input, weight = torch.randn(41, 35, dtype=dtype), torch.randn(21, 35, dtype=dtype)
    grad_output = torch.randn(41, 21, dtype=dtype)
    strided = [LAYOUTS[layout](t) for t in (input, weight, grad_output)]
    results = []
    for x, w, g in (strided, [t.contiguous() for t in strided]):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        output = masked_linear(x, w, kept, activation="relu", algorithm="panel")
        results.append([output, *torch.autograd.grad(output, (x, w), g)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_batch_dimensions_of_any_order():
    kept = pattern(6, 10)
    input, weight = torch.randn(3, 5, 10).transpose(0, 1), torch.randn(6, 10)
    actual = masked_linear(input, weight, kept, algorithm="panel")
    check_close(actual, F.linear(input, weight * kept.mask), 1e-5, "value")
    assert masked_linear(input[0, 0], weight, kept).shape == (6,)
    assert masked_linear(torch.zeros(0, 4, 10), weight, kept).shape == (0, 4, 6)


@pytest.mark.parametrize("algorithm", ["panel", "dense"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_the_weight_holds_off_the_mask_is_never_seen(algorithm, bad):
    kept = pattern(12, 10)
    weight = torch.randn(12, 10).masked_fill(~kept.mask, bad).requires_grad_()
    input = torch.randn(7, 10, requires_grad=True)
    output = masked_linear(input, weight, kept, algorithm=algorithm)
    grads = torch.autograd.grad(output.sum(), (input, weight), create_graph=True)
    second = torch.autograd.grad(grads[0].square().sum(), weight)
    for result in (output, *grads, *second):
        assert torch.isfinite(result).all()
    assert (grads[1][~kept.mask] == 0).all()


@pytest.mark.parametrize("algorithm", ["panel", "dense"])
def test_dense_grad_is_the_gradient_without_mask(algorithm):
    kept = pattern(8, 6)
    input, weight = torch.randn(5, 6), torch.randn(8, 6, requires_grad=True)
    masked = (weight.detach() * kept.mask).requires_grad_()
    (expected,) = torch.autograd.grad(F.relu(F.linear(input, masked)).square().sum(), masked)
    output = masked_linear(
        input, weight, kept, activation="relu", dense_grad=True, algorithm=algorithm
    )
    (actual,) = torch.autograd.grad(output.square().sum(), weight)
    assert (expected[~kept.mask] != 0).any()
    check_close(actual, expected, 1e-5, "gradient")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype, isa):
    # 4096 + 1 + ... + 1 stays 4096 when a half type is summed one by one.
    kept = SparsityPattern.from_mask(torch.ones(1, 1025, dtype=torch.bool))
    input = torch.ones(1, 1025, dtype=dtype)
    input[0, 0] = 4096
    output = masked_linear(input, torch.ones(1, 1025, dtype=dtype), kept, algorithm="panel")
    assert output.item() == torch.tensor(5120.0, dtype=dtype).item()


@pytest.mark.parametrize("algorithm", ["panel", "dense"])
def test_relu_stops_an_infinite_gradient(algorithm):
    kept = SparsityPattern.from_mask(torch.ones(1, 1).bool())
    weight = torch.full((1, 1), -1.0, requires_grad=True)
    output = masked_linear(torch.ones(1, 1), weight, kept, None, "relu", algorithm=algorithm)
    assert torch.autograd.grad(output, weight, torch.full((1, 1), torch.inf))[0].item() == 0


def test_nan_inputs_are_passed_on(isa):
    kept = SparsityPattern.from_mask(torch.tensor([[True, False], [False, True]]))
    input = torch.tensor([[float("nan"), 1.0]])
    output = masked_linear(input, torch.ones(2, 2), kept, activation="relu", algorithm="panel")
    assert output[0, 0].isnan() and output[0, 1] == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("asked", [("input",), ("weight",), ("input", "weight")])
def test_backward_computes_what_the_pass_asks_for(asked, bias, monkeypatch):
    """An attack differentiates the input alone; the weight requires a gradient all the same."""
    seen = []
    backward = op._backward
    monkeypatch.setattr(op, "_backward", lambda *args: seen.append(args[-1]) or backward(*args))
    kept = pattern(8, 6)
    tensors = {
        "input": torch.randn(4, 6, requires_grad=True),
        "weight": torch.randn(8, 6, requires_grad=True),
    }
    offset = torch.randn(8, requires_grad=True) if bias else None
    hidden = 2 * tensors["input"]
    output = masked_linear(hidden, tensors["weight"], kept, offset, algorithm="panel")
    expected = F.linear(hidden, tensors["weight"] * kept.mask, offset)
    wanted = [tensors[name] for name in asked]
    for a, e in zip(
        torch.autograd.grad(output.sum(), wanted, retain_graph=True),
        torch.autograd.grad(expected.sum(), wanted, retain_graph=True),
        strict=True,
    ):
        check_close(a, e, 1e-5, "gradient")
    output.sum().backward()
    assert seen == [["input" in asked, "weight" in asked, False], [True, True, bias]]
    assert tensors["weight"].grad is not None


def test_backward_keeps_only_the_input_for_itself():
    kept = pattern(64, 48)
    input = torch.randn(9, 48, requires_grad=True)
    values = torch.randn(kept.nnz, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (input, values, *kept.tensors)}
    extra = []

    def pack(tensor):
        if tensor.numel() and tensor.untyped_storage().data_ptr() not in known:
            extra.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        masked_linear(input, values, kept, algorithm="panel")
    assert extra == []


def test_autocast_casts_as_linear_does():
    kept = pattern(6, 4)
    weight = torch.randn(6, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = masked_linear(torch.randn(3, 4), weight, kept)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_pattern_is_an_ordinary_argument_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w, p: masked_linear(x, w, p, activation="relu"),
        fullgraph=True,
        backend="aot_eager",
    )
    for seed in (0, 1):
        kept = SparsityPattern.from_mask(
            torch.rand(11, 7, generator=torch.Generator().manual_seed(seed)) < 0.3
        )
        input, weight = torch.randn(5, 7), torch.randn(11, 7, requires_grad=True)
        actual = compiled(input, weight, kept)
        expected = F.relu(F.linear(input, weight * kept.mask))
        check_close(actual, expected, 1e-6, "value")
        (found,) = torch.autograd.grad(actual.sum(), weight)
        check_close(found, torch.autograd.grad(expected.sum(), weight)[0], 1e-6, "gradient")


KERNEL = SparsityPattern.from_mask(torch.ones(2, 1, 3, 3, dtype=torch.bool))
GOOD = {
    "input": torch.zeros(2, 3),
    "weight": torch.zeros(4, 3),
    "bias": torch.zeros(4),
    "pattern": SparsityPattern.from_mask(torch.ones(4, 3, dtype=torch.bool)),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pattern": torch.ones(4, 3)}, TypeError, "SparsityPattern, got Tensor"),
        ({"input": [1.0]}, TypeError, "input to be a tensor, got list"),
        ({"input": torch.zeros(2, 3).long()}, TypeError, "got torch.int64"),
        ({"input": torch.zeros(2, 3).double()}, TypeError, "torch.float64, got torch.float32"),
        ({"weight": torch.zeros(4, 3).half()}, TypeError, "torch.float32, got torch.float16"),
        ({"input": torch.zeros(2, 5)}, ValueError, r"\(..., 3\), got \(2, 5\)"),
        ({"input": torch.tensor(1.0)}, ValueError, r"\(..., 3\), got \(\)"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"\(12,\), got \(3, 4\)"),
        ({"weight": torch.zeros(11)}, ValueError, r"\(12,\), got \(11,\)"),
        ({"bias": torch.zeros(3)}, ValueError, r"\(4,\), got \(3,\)"),
        ({"input": torch.zeros(2, 3, device="meta")}, ValueError, "device cpu, got meta"),
        ({"weight": torch.zeros(4, 3).to_sparse()}, ValueError, "got torch.sparse_coo"),
        ({"activation": "tanh"}, ValueError, "none, relu, gelu, got 'tanh'"),
        ({"algorithm": "fast"}, ValueError, "panel, .*dense, got 'fast'"),
        ({"weight": torch.zeros(12), "dense_grad": True}, ValueError, "values of shape"),
        ({"algorithm": "panel", "backend": "reference"}, RuntimeError, "got 'reference'"),
        ({"backend": "triton"}, RuntimeError, "only native, reference"),
        ({"pattern": KERNEL}, ValueError, r"\(N, K\), got \(2, 1, 3, 3\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        masked_linear(**{**GOOD, **change})


def test_panel_is_refused_where_the_backend_is_forced_to_reference():
    with use_backend("reference"), pytest.raises(RuntimeError, match="needs the native backend"):
        masked_linear(**GOOD, algorithm="panel")
