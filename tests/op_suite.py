"""The contract every op meets. A test file declares an `OpSpec` and inherits `OpSuite`:

    class TestMyOp(OpSuite):
        spec = OpSpec(name="my_op", public=my_op, reference=reference, samples={...}, raw_calls=...)

Every floating tensor in a sample's arguments (lists included) is an input to differentiate.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils import _pytree as pytree

import tscnc_kernels

# Element-wise tolerance (absolute = relative) on inputs of order one, and the bound on the relative
# RMS error.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1.6e-2,
}

Make = Callable[..., Tensor]
Sample = Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
BACKENDS = ["native", "triton", "reference"]


@dataclass
class OpSpec:
    """What the suite needs to know of an op.

    name: the op's name.
    public: the public function, which takes `backend=`.
    reference: plain torch, with the arguments of `public` less `backend`.
    samples: name -> function of make(*shape) -> (args, kwargs); make draws normal numbers in the
        tested dtype. Names starting with "empty" are left out of derivative checks.
    raw_calls: torch ops with arguments, for opcheck.
    dtypes: the dtypes that the op takes.
    tolerances: exceptions to TOLERANCES, each with the reason in a comment.
    vmap: False where the arguments cannot be batched.
    smooth: False where there is no second derivative.
    """

    name: str
    public: Callable[..., Any]
    reference: Callable[..., Any]
    samples: dict[str, Sample]
    raw_calls: Callable[[], list[tuple[Any, tuple[Any, ...]]]]
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)
    tolerances: dict[torch.dtype, float] = field(default_factory=dict)
    vmap: bool = True
    smooth: bool = True

    def tolerance(self, dtype: torch.dtype) -> float:
        return self.tolerances.get(dtype, TOLERANCES[dtype])


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _inputs(args: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(args) if _is_input(leaf)]


def _map_inputs(function: Callable[[Tensor], Any], args: Any) -> Any:
    return pytree.tree_map(lambda leaf: function(leaf) if _is_input(leaf) else leaf, args)


def _outputs(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if _is_input(leaf)]


def _scalar(result: Any) -> Tensor:
    """A fixed, generic linear functional of all outputs: its gradient tests every one."""
    total = torch.zeros((), dtype=torch.float64)
    for index, output in enumerate(_outputs(result)):
        weights = torch.linspace(
            0.5, 1.5, output.numel(), dtype=torch.float64, device=output.device
        )
        total = total + (output.double().reshape(-1) * weights).sum().cpu() * (index + 1)
    return total


def check_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """Element-wise and in relative RMS."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert_close(actual, expected, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")
    norm = expected.norm()
    if norm > 0 and torch.isfinite(norm):
        error = ((actual - expected).norm() / norm).item()
        assert error <= tolerance, f"{what}: relative RMS error {error:.2e} > {tolerance:.0e}"


def check_capture(step: Callable[[], list[Tensor]]) -> None:
    """On a GPU: the step never waits for it, and replays from a graph with the same bits."""
    step()  # compiles and fills caches, which a capture could not
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for found, wanted in zip(captured, expected, strict=True):
        assert torch.equal(found, wanted)


class OpSuite:
    """Inherit, set `spec`, and pytest runs the contract."""

    spec: ClassVar[OpSpec]

    def sample(
        self, name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = True
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(7)

        def make(*shape: int) -> Tensor:
            return (
                torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
            )

        args, kwargs = self.spec.samples[name](make)
        return _map_inputs(lambda t: t.detach().clone().requires_grad_(grad), args), kwargs

    def smooth_samples(self) -> list[str]:
        return [name for name in self.spec.samples if not name.startswith("empty")]

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        result = function(*args, **kwargs)
        inputs = _inputs(args)
        gradients = torch.autograd.grad(_scalar(result), inputs, allow_unused=True)
        return result, list(gradients)

    def _compare(self, sample: str, backend: str, dtype: torch.dtype, device: str) -> None:
        args, kwargs = self.sample(sample, dtype, device)
        result, gradients = self._run(self.spec.public, args, {**kwargs, "backend": backend})
        exact = _map_inputs(lambda t: t.detach().double().cpu().requires_grad_(), args)
        exact = pytree.tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, exact)
        expected, expected_gradients = self._run(self.spec.reference, exact, kwargs)
        tolerance = self.spec.tolerance(dtype)
        for actual, wanted in zip(_outputs(result), _outputs(expected), strict=True):
            assert actual.shape == wanted.shape
            check_close(actual, wanted, tolerance, "value")
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            assert (actual is None) == (wanted is None)
            if actual is not None:
                assert actual.dtype == dtype
                check_close(actual, wanted, tolerance, "gradient")

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_value_and_gradient_match_float64_reference(self, backend, dtype, device):
        if backend not in tscnc_kernels.available_backends(self.spec.name, device):
            pytest.skip(f"{self.spec.name} has no {backend} backend on {device}")
        if dtype not in self.spec.dtypes:
            pytest.skip(f"{self.spec.name} does not take {dtype}")
        for sample in self.spec.samples:
            self._compare(sample, backend, dtype, device)

    def test_every_instruction_set_agrees(self, isa):
        if "native" not in tscnc_kernels.available_backends(self.spec.name):
            pytest.skip("no native CPU kernel")
        for dtype in self.spec.dtypes:
            for sample in self.spec.samples:
                self._compare(sample, "native", dtype, "cpu")

    def _flat(self, sample: str, dtype: torch.dtype, backend: str | None = None) -> tuple[Any, ...]:
        """The public op as a function of its differentiable tensors alone."""
        args, kwargs = self.sample(sample, dtype)
        leaves, spec = pytree.tree_flatten(args)
        places = [index for index, leaf in enumerate(leaves) if _is_input(leaf)]

        def function(*inputs: Tensor) -> Any:
            filled = list(leaves)
            for place, value in zip(places, inputs, strict=True):
                filled[place] = value
            result = self.spec.public(
                *pytree.tree_unflatten(filled, spec), **kwargs, backend=backend
            )
            outputs = tuple(_outputs(result))
            return outputs[0] if len(outputs) == 1 else outputs

        return function, [leaves[place] for place in places]

    def test_gradcheck(self):
        for sample in self.smooth_samples():
            function, inputs = self._flat(sample, torch.float64)
            assert torch.autograd.gradcheck(function, inputs)

    def test_second_derivatives(self):
        if not self.spec.smooth:
            pytest.skip("the op has no second derivative")
        for sample in self.smooth_samples():
            function, inputs = self._flat(sample, torch.float64)
            assert torch.autograd.gradgradcheck(function, inputs)

    def test_func_grad(self):
        sample = self.smooth_samples()[0]
        function, inputs = self._flat(sample, torch.float64)
        detached = [t.detach() for t in inputs]
        actual = torch.func.grad(
            lambda *x: _scalar(function(*x)), argnums=tuple(range(len(inputs)))
        )(*detached)
        expected = torch.autograd.grad(_scalar(function(*inputs)), inputs)
        for a, e in zip(actual, expected, strict=True):
            check_close(a, e, 1e-10, "torch.func.grad")

    def test_vmap(self):
        if not self.spec.vmap:
            pytest.skip("the op's arguments cannot be batched")
        sample = self.smooth_samples()[0]
        function, inputs = self._flat(sample, torch.float64)
        batched = [torch.stack([t.detach(), 0.5 * t.detach(), -t.detach()]) for t in inputs]

        def loss(*x: Tensor) -> Tensor:
            return sum(output.sum() for output in pytree.tree_leaves(function(*x)))

        argnums = tuple(range(len(inputs)))
        value_and_grad = torch.func.grad_and_value(loss, argnums=argnums)
        gradients, values = torch.func.vmap(value_and_grad)(*batched)
        for index in range(3):
            expected, value = value_and_grad(*(b[index] for b in batched))
            check_close(values[index], value, 1e-10, "vmap value")
            for a, e in zip(gradients, expected, strict=True):
                check_close(a[index], e, 1e-10, "vmap gradient")

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_compiles_to_one_graph_without_recompiling(self, dynamic):
        from torch._dynamo.testing import CompileCounterWithBackend

        torch._dynamo.reset()
        function, inputs = self._flat(self.smooth_samples()[0], torch.float32)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
        eager = torch.autograd.grad(_scalar(function(*inputs)), inputs)
        graphs = []
        for _ in range(2):
            actual = torch.autograd.grad(_scalar(compiled(*inputs)), inputs)
            for a, e in zip(actual, eager, strict=True):
                assert_close(a, e)
            graphs.append(counter.frame_count)
        assert graphs[0] >= 1 and graphs[1] == graphs[0], f"graphs after each call: {graphs}"

    def test_opcheck(self):
        for op, args in self.spec.raw_calls():
            torch.library.opcheck(op, args)

    def test_non_contiguous_inputs(self):
        for sample in self.smooth_samples():
            function, inputs = self._flat(sample, torch.float32)
            expected = torch.autograd.grad(_scalar(function(*inputs)), inputs)
            strided = []
            for tensor in inputs:
                wide = torch.stack([tensor.detach(), torch.full_like(tensor, torch.nan)], dim=-1)
                strided.append(wide[..., 0].requires_grad_())
            actual = torch.autograd.grad(_scalar(function(*strided)), strided)
            for a, e in zip(actual, expected, strict=True):
                assert_close(a, e)

    def test_inputs_are_not_modified(self):
        for sample in self.spec.samples:
            args, kwargs = self.sample(sample)
            before = [t.detach().clone() for t in _inputs(args)]
            self._run(self.spec.public, args, kwargs)
            for now, then in zip(_inputs(args), before, strict=True):
                assert torch.equal(now.detach(), then)

    def test_same_bits_every_run_and_for_any_thread_count(self):
        threads = torch.get_num_threads()
        try:
            for sample in self.spec.samples:
                runs = []
                for count in (1, 1, 2, 3):
                    torch.set_num_threads(count)
                    args, kwargs = self.sample(sample)
                    result, gradients = self._run(self.spec.public, args, kwargs)
                    runs.append([o.detach() for o in _outputs(result)] + gradients)
                for run in runs[1:]:
                    for a, b in zip(run, runs[0], strict=True):
                        assert (a is None and b is None) or torch.equal(a, b)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
    @pytest.mark.parametrize("backend", ["native", "triton"])
    def test_cuda_calls_never_wait_for_the_gpu_and_can_be_captured(self, backend):
        if backend not in tscnc_kernels.available_backends(self.spec.name, "cuda"):
            pytest.skip(f"{self.spec.name} has no {backend} backend on cuda")
        args, kwargs = self.sample(self.smooth_samples()[0], device="cuda")
        inputs = _inputs(args)

        def step() -> list[Tensor]:
            outputs = _outputs(self.spec.public(*args, **kwargs, backend=backend))
            used = [output for output in outputs if output.requires_grad]
            ones = [torch.ones_like(output) for output in used]
            gradients = torch.autograd.grad(used, inputs, ones, allow_unused=True)
            return [*outputs, *(gradient for gradient in gradients if gradient is not None)]

        check_capture(step)

    def test_backend_errors(self):
        args, kwargs = self.sample(next(iter(self.spec.samples)))
        with pytest.raises(RuntimeError, match="got 'cudnn'"):
            self.spec.public(*args, **kwargs, backend="cudnn")
        with tscnc_kernels.use_backend("reference"):
            forced = self.spec.public(*args, **kwargs)
        direct = self.spec.public(*copy.copy(args), **kwargs, backend="reference")
        for a, b in zip(_outputs(forced), _outputs(direct), strict=True):
            assert torch.equal(a, b)

    def test_autocast_keeps_values_close(self):
        args, kwargs = self.sample(self.smooth_samples()[0])
        expected, expected_gradients = self._run(self.spec.public, args, kwargs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result, gradients = self._run(self.spec.public, args, kwargs)
        for a, e in zip(_outputs(result), _outputs(expected), strict=True):
            assert_close(a.float(), e.float(), atol=3e-2, rtol=3e-2)
        for a, e in zip(gradients, expected_gradients, strict=True):
            assert (a is None) == (e is None)
            if a is not None:
                assert a.dtype == e.dtype
                assert_close(a, e, atol=3e-2, rtol=3e-2)
