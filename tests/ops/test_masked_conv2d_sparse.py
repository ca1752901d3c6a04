"""masked_conv2d with few kept weights, and its gradients together and apart."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_suite import check_close
from tests.ops.test_masked_conv2d import CONVOLUTIONS, SPARSE, pattern, runnable
from tscnc_kernels import SparsityPattern, masked_conv2d


def few(*shape: int, kept: int) -> SparsityPattern:
    """A pattern of `kept` weights, so that rows and channels stay empty."""
    generator = torch.Generator().manual_seed(kept)
    places = torch.randperm(torch.Size(shape).numel(), generator=generator)[:kept]
    mask = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
    mask[places] = True
    return SparsityPattern.from_mask(mask.reshape(shape))


def check_gradients(input, kept, activation="none", algorithms=None, tolerance=1e-11, **kwargs):
    """Values and every combination of gradients against torch's convolution in float64."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(kept.shape, generator=generator, dtype=torch.float64) * kept.mask
    bias = torch.randn(kept.shape[0], generator=generator, dtype=torch.float64)
    act = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu}[activation]
    exact = [input.double(), weight, bias]
    exact = [t.detach().clone().requires_grad_() for t in exact]
    expected = act(F.conv2d(*exact, **kwargs))
    grad_output = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = list(torch.autograd.grad(expected, exact, grad_output))
    wanted[1] = kept.gather(wanted[1])
    layout = torch.contiguous_format
    if not input.is_contiguous():
        layout = torch.channels_last
    for algorithm in algorithms or runnable(kept, input, **kwargs):
        leaves = [input, kept.gather(weight).to(input.dtype), bias.to(input.dtype)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        x, values, b = leaves
        output = masked_conv2d(
            x, values, kept, b, **kwargs, activation=activation, algorithm=algorithm
        )
        check_close(output.detach().double(), expected.detach(), tolerance, "value")
        gradient = grad_output.to(input.dtype).contiguous(memory_format=layout)
        for chosen in ((0, 1, 2), (0, 1), (0, 2), (1, 2), (0,), (1,), (2,)):
            found = torch.autograd.grad(
                output, [leaves[i] for i in chosen], gradient, retain_graph=True
            )
            for i, grad in zip(chosen, found, strict=True):
                check_close(grad.double(), wanted[i], tolerance, f"gradient {i} of {chosen}")


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_together_equal_those_apart(name, isa):
    shape, kwargs = CONVOLUTIONS[name]
    check_gradients(torch.randn(5, 6, 9, 10, dtype=torch.float64), pattern(*shape), **kwargs)


@pytest.mark.parametrize("kept", [1, 9, 40])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 7), (9, 5), (14, 14), (3, 75), (30, 56)])
def test_few_weights_on_images_of_any_size(size, kept, isa):
    input = torch.randn(3, 12, *size, dtype=torch.float64)
    check_gradients(input, few(10, 12, 3, 3, kept=kept), padding=1)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("batch", [2, 19])
def test_few_weights_with_activation(activation, batch, isa):
    input = torch.randn(batch, 12, 7, 9, dtype=torch.float64)
    check_gradients(input, few(10, 12, 3, 3, kept=20), activation, padding=1)


@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
def test_few_weights_channels_last(stride, isa):
    input = torch.randn(3, 21, 8, 11, dtype=torch.float64)
    input = input.contiguous(memory_format=torch.channels_last)
    check_gradients(input, few(19, 21, 3, 3, kept=90), stride=stride, padding=1)


def test_bands_of_images_whose_channels_are_mostly_unused(isa):
    input = torch.randn(2, 40, 130, 67, dtype=torch.float64)
    check_gradients(input, few(36, 40, 3, 3, kept=300), tolerance=1e-10, padding=1)


def test_images_smaller_than_the_stride(isa):
    input = torch.randn(3, 4, 2, 1, dtype=torch.float64)
    check_gradients(input, pattern(5, 4, 2, 2), stride=3, padding=1)


def test_output_gradient_beyond_the_images(isa):
    """Padding past the kernel's reach: rows and columns of results that see only the bias."""
    input = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    check_gradients(input, few(5, 4, 2, 2, kept=12), padding=(4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_every_dtype(dtype, isa):
    tolerance = {torch.float32: 2e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}[dtype]
    input = torch.randn(9, 12, 7, 7).to(dtype)
    kept = few(10, 12, 3, 3, kept=30)
    check_gradients(input, kept, tolerance=tolerance, padding=1)


@pytest.mark.parametrize("algorithm", SPARSE)
def test_channels_that_no_weight_reads_may_hold_anything(algorithm, isa):
    kept = few(6, 9, 3, 3, kept=4)
    used = kept.mask.any(0).any(-1).any(-1)
    assert not used.all()
    input = torch.randn(3, 9, 6, 5)
    input[:, ~used] = float("nan")
    input.requires_grad_()
    values = torch.randn(4, requires_grad=True)
    output = masked_conv2d(input, values, kept, padding=1, algorithm=algorithm)
    for needs in ((input, values), (values,)):
        found = torch.autograd.grad(output.sum(), needs, retain_graph=True)
        assert all(torch.isfinite(grad).all() for grad in found)
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("batch", [3, 20])
def test_few_weights_give_the_same_bits_for_any_thread_count(batch):
    kept = few(48, 40, 3, 3, kept=500)
    input, values, bias = torch.randn(batch, 40, 30, 28), torch.randn(500), torch.randn(48)
    threads = torch.get_num_threads()
    for algorithm in SPARSE:
        runs = []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                leaves = [t.clone().requires_grad_() for t in (input, values, bias)]
                output = masked_conv2d(
                    *(leaves[0], leaves[1], kept, leaves[2]), padding=1, algorithm=algorithm
                )
                grads = torch.autograd.grad(output.square().sum(), leaves)
                runs.append([output.detach(), *grads])
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            for a, b in zip(run, runs[0], strict=True):
                assert torch.equal(a, b)
