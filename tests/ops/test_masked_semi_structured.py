"""Weights that keep 2 of 4: when torch's product is a candidate, and what it is given."""

import pytest
import torch
import torch.nn.functional as F

from tscnc_kernels import SparsityPattern, _autotune, _masked_cuda, masked_linear
from tscnc_kernels import _masked_semi_structured as semi
from tscnc_kernels._masked_algorithms import Call, choose, plan_for

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ROWS, WIDTH = 64, 128


def two_of_four(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    noise = torch.rand(rows, width // 4, 4, generator=torch.Generator().manual_seed(1))
    return (noise.argsort(-1).argsort(-1) < 2).view(rows, width)


def layer(dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(2)
    sizes = (32, WIDTH), (ROWS, WIDTH), (ROWS,)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


class OnCuda:
    """A pattern as far as the choice of an algorithm looks at it."""

    device = torch.device("cuda")
    block_shape = None
    shape, nnz, density = (4096, 4096), 4096 * 2048, 0.5

    def __init__(self) -> None:
        self._is_semi_structured = True


@pytest.fixture
def device_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Test GPU")


def test_masks_are_told_apart():
    mask = two_of_four()
    assert semi.is_semi_structured(SparsityPattern.from_mask(mask))
    assert semi.is_semi_structured(SparsityPattern.from_mask(torch.zeros(3, 8, dtype=torch.bool)))
    mask[5, 8:11] = True
    assert not semi.is_semi_structured(SparsityPattern.from_mask(mask))
    assert not semi.is_semi_structured(SparsityPattern.from_mask(torch.zeros(3, 6) > 0))


def test_it_is_no_candidate_unless_asked_for(device_name):
    call = Call(256, dtype=torch.bfloat16)
    for forced in (None, "dense"):
        plan = plan_for("masked_linear", OnCuda(), "native", call, forced)
        assert semi.SEMI_STRUCTURED not in plan.preview("forward").predicted


def test_asked_for_it_races_with_dense_alone(device_name, tuner):
    plan = plan_for(
        "masked_linear", OnCuda(), "native", Call(256, dtype=torch.bfloat16), semi.SEMI_STRUCTURED
    )
    decision = plan.preview("forward")
    assert set(decision.predicted) == {"dense", semi.SEMI_STRUCTURED}
    assert set(_autotune.shortlist(decision.predicted)) == set(decision.predicted)
    for direction in ("grad_input", "grad_weight", "backward"):
        assert semi.SEMI_STRUCTURED not in plan.preview(direction).predicted


def test_without_a_measurement_dense_runs(device_name):
    call = Call(256, dtype=torch.bfloat16)
    plan = plan_for("masked_linear", OnCuda(), "native", call, semi.SEMI_STRUCTURED)
    assert plan.preview("forward").algorithm == "dense"
    assert choose("masked_linear", OnCuda(), "native", None, semi.SEMI_STRUCTURED) == ("dense",) * 3


def test_the_faster_one_by_measurement_runs(device_name, tuner, monkeypatch):
    call = Call(256, dtype=torch.bfloat16)
    for seconds, winner in ((1.0, "dense"), (0.5, semi.SEMI_STRUCTURED)):
        _autotune.state.forget()
        times = {"dense": 1.0, semi.SEMI_STRUCTURED: seconds}
        monkeypatch.setattr(_autotune, "measure", lambda *_, times=times: times)
        monkeypatch.setattr(_autotune.DecisionFile, "read", lambda self: {})
        plan = plan_for("masked_linear", OnCuda(), "native", call, semi.SEMI_STRUCTURED)
        assert plan.pick("forward", lambda name: None, layer()) == winner


def test_what_cannot_run_is_refused():
    mask = two_of_four()
    input, weight, bias = layer()
    kept = SparsityPattern.from_mask(mask)
    with pytest.raises(RuntimeError, match="needs the native backend on a GPU, got 'native' on cp"):
        masked_linear(input, weight, kept, bias, algorithm=semi.SEMI_STRUCTURED)
    fake = OnCuda()
    fake._is_semi_structured = False
    assert "at most 2 of every 4" in semi.why_not(fake, "native")
    with pytest.raises(RuntimeError, match=r"float16 or bfloat16, got torch\.float32"):
        semi.semi_structured_product(*layer(torch.float32), kept, 0, False)


@pytest.fixture
def compressions(monkeypatch):
    """The weights that torch was asked to compress; they stay dense."""
    asked: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch.sparse, "to_sparse_semi_structured", lambda dense: asked.append(dense) or dense
    )
    return asked


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_the_product_is_that_of_the_masked_weight(compressions, activation):
    input, weight, bias = layer()
    kept = SparsityPattern.from_mask(two_of_four())
    code = {"none": 0, "relu": 1, "gelu": 2}[activation]
    y, z = semi.semi_structured_product(input, weight, bias, kept, code, save=True)
    expected = F.linear(input, weight * kept.mask, bias)
    assert torch.equal(z, expected)
    wanted = {"none": expected, "relu": expected.relu(), "gelu": F.gelu(expected)}[activation]
    assert torch.equal(y, wanted)
    values = kept.gather(weight)
    assert torch.equal(semi.semi_structured_product(input, values, bias, kept, 0, False)[0], z)
    assert all(semi.is_semi_structured(SparsityPattern.from_mask(w != 0)) for w in compressions)


def test_a_constant_weight_is_compressed_once(compressions):
    input, weight, bias = layer()
    kept = SparsityPattern.from_mask(two_of_four())

    def run():
        return semi.semi_structured_product(input, weight, bias, kept, 0, False)[0]

    first = run()
    assert torch.equal(run(), first) and len(compressions) == 1
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(run(), F.linear(input, weight * kept.mask, bias)) and len(compressions) == 2


def test_a_trained_weight_is_compressed_every_time(compressions):
    input, weight, bias = layer()
    weight.requires_grad_()
    kept = SparsityPattern.from_mask(two_of_four())
    for _ in range(2):
        semi.semi_structured_product(input, weight, bias, kept, 0, False)
    assert len(compressions) == 2


def test_the_race_predicts_a_tie():
    times = _masked_cuda.predict_race("masked_linear", (64, 64), 2048, Call(32), "forward")
    assert len(set(times.values())) == 1 and _autotune.fastest(times) == "dense"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_semi_structured_product_matches_dense(dtype):
    input, weight, bias = layer(dtype, "cuda")
    kept = SparsityPattern.from_mask(two_of_four()).to("cuda")
    found, _ = semi.semi_structured_product(input, weight, bias, kept, 1, False)
    expected = F.linear(input.double(), weight.double() * kept.mask, bias.double()).relu()
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-1)
