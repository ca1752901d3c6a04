"""masked_linear with measured algorithms: what is measured, when, and that results do not care."""

import gc
import math
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import tscnc_kernels
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern, _autotune, masked_linear
from tscnc_kernels import _masked_algorithms as algorithms
from tscnc_kernels._masked_algorithms import Call, plan_for, plans_of

pytestmark = pytest.mark.usefixtures("tuner")


def pattern(density=0.1, rows=48, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SparsityPattern.from_mask(torch.rand(rows, width, generator=generator) < density)


def step(kept, input, weight, activation="relu", algorithm=None):
    leaves = [input.detach().requires_grad_(), weight.detach().requires_grad_()]
    bias = torch.linspace(-1, 1, kept.shape[0], requires_grad=True)
    output = masked_linear(leaves[0], leaves[1], kept, bias, activation, algorithm=algorithm)
    scale = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    return output.detach(), *torch.autograd.grad(output, [*leaves, bias], scale)


def test_each_direction_runs_what_was_measured_for_it(monkeypatch):
    """The clock makes another algorithm the best in every direction; all results stay right."""
    wanted = {
        **{"forward": "dense", "backward": "separate"},
        **{"grad_input": "panel", "grad_weight": "dense"},
    }
    real, asked = _autotune.decide, []

    def fake(key, predicted, compute, tensors):
        direction = key.rsplit("/", 1)[1]
        asked.append(direction)
        times = {name: 1.0 if name == wanted[direction] else 9.0 for name in predicted}
        monkeypatch.setattr(_autotune, "measure", lambda *_: times)
        return real(key, predicted, compute, tensors)

    monkeypatch.setattr(_autotune, "decide", fake)
    kept, input = pattern(), torch.randn(40, 64)
    values = kept.gather(torch.randn(48, 64))
    first, second = step(kept, input, values), step(kept, input, values)
    assert asked == list(wanted)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    (plan,) = plans_of(kept)
    assert {way: found.algorithm for way, found in plan.decisions.items()} == wanted
    expected = F.relu(F.linear(input, kept.scatter(values), torch.linspace(-1, 1, 48)))
    check_close(first[0], expected, 1e-5, "value")
    for a, e in zip(first[1:], step(kept, input, values, algorithm="panel")[1:], strict=True):
        check_close(a, e, 1e-4, "gradient")


@pytest.mark.parametrize("winner", ["dense", "panel"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_the_call_that_measures_gives_the_bits_of_all_later_ones(winner, activation, monkeypatch):
    times = {"dense": 1.0, "panel": 2.0 if winner == "dense" else 0.5}
    monkeypatch.setattr(_autotune, "measure", lambda *_: times)
    kept, input = pattern(), torch.randn(33, 64)
    runs = [step(kept, input, torch.ones(48, 64), activation) for _ in range(3)]
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            assert torch.equal(a, b)


def test_a_new_mask_is_measured_only_beyond_its_bucket(monkeypatch):
    measured = []
    monkeypatch.setattr(
        _autotune,
        "measure",
        lambda names, *_: measured.append(1) or dict.fromkeys(names, 1.0),
    )
    input = torch.randn(8, 64)
    for density, seed, expected in ((0.2, 0, 1), (0.2, 1, 1), (0.6, 2, 2)):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.zeros(48 * 64, dtype=torch.bool)
        mask[torch.randperm(48 * 64, generator=generator)[: int(density * 48 * 64)]] = True
        kept = SparsityPattern.from_mask(mask.reshape(48, 64))
        masked_linear(input, torch.randn(48, 64), kept)
        assert len(measured) == expected


def test_usual_sparsities_lie_inside_their_buckets():
    for sparsity in (0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999):
        density = 1 - sparsity
        near = {algorithms.density_bucket(density * factor) for factor in (0.985, 1.0, 1.015)}
        assert len(near) == 1, sparsity
    buckets = [algorithms.density_bucket(step / 1000) for step in range(1001)]
    assert buckets == sorted(buckets) and len(set(buckets)) > 50


def test_predictions_do_not_depend_on_which_batch_comes_first(monkeypatch):
    monkeypatch.setattr(_autotune.state, "mode", "off")
    for density in (0.01, 0.1, 0.3, 0.5, 0.7):
        for low, high in ((17, 31), (64, 127)):
            kept = pattern(density, 300, 200)
            plans = [
                plan_for("masked_linear", SparsityPattern.from_mask(kept.mask), "native", call)
                for call in (Call(low, True), Call(high, True))
            ]
            for direction in algorithms.DIRECTIONS:
                first, second = (plan.preview(direction) for plan in plans)
                assert first == second


def test_batches_share_decisions_by_octave():
    buckets = [algorithms.batch_bucket(batch) for batch in range(1, 4096)]
    assert buckets == sorted(buckets) and buckets[:16] == list(range(1, 17))
    assert len(set(buckets)) == 24
    assert algorithms.batch_bucket(128) == algorithms.batch_bucket(255)


def test_nothing_is_measured_while_tracing_or_transforming(monkeypatch):
    def refuse(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(_autotune, "measure", refuse)
    kept = pattern()
    weight, input = torch.randn(48, 64), torch.randn(5, 64)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x, w: masked_linear(x, w, kept), fullgraph=True, backend="aot_eager"
    )
    expected = F.linear(input, weight * kept.mask)
    for _ in range(2):
        check_close(compiled(input, weight), expected, 1e-5, "value")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    mapped = torch.func.vmap(lambda x: masked_linear(x, weight, kept))(input)
    check_close(mapped, expected, 1e-5, "value")
    torch.func.grad(lambda x: masked_linear(x, weight, kept).sum())(input)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = mode.from_tensor(input), mode.from_tensor(weight)
        assert not _autotune.can_measure(fakes)
    assert not _autotune.can_measure([torch.ones(1, device="meta")])
    assert not plans_of(kept) or not any(plan.decisions for plan in plans_of(kept))


def test_flop_counters_see_one_call(monkeypatch):
    kept = pattern(1.0)
    with FlopCounterMode(display=False) as counter:
        masked_linear(torch.randn(8, 64), torch.randn(48, 64), kept, algorithm=None)
    assert counter.get_total_flops() in (0, 2 * 8 * 64 * 48)


def test_calls_too_short_to_repay_are_predicted(monkeypatch):
    monkeypatch.setattr(_autotune, "WORTH", math.inf)
    kept = pattern()
    masked_linear(torch.randn(2, 64), torch.randn(48, 64), kept)
    (plan,) = plans_of(kept)
    assert plan.decisions["forward"].reason == "predicted, too short to measure"


def test_a_decision_that_is_known_is_found_quickly():
    """A lookup is a few dictionary reads: no lock, no file, no new plan."""
    kept, call = pattern(), Call(8, True)
    plan = plan_for("masked_linear", kept, "native", call)
    assert plan_for("masked_linear", kept, "native", call) is plan
    assert plan_for("masked_linear", kept, "native", call._replace(batch=9)) is not plan
    plan.pick("forward", lambda name: None, (torch.ones(1),))
    with _autotune.state.lock:
        worker = threading.Thread(target=plan.pick, args=("forward", None, ()))
        worker.start()
        worker.join(5)
        assert not worker.is_alive()


def test_plans_do_not_keep_patterns_alive():
    gc.disable()
    try:
        kept = pattern()
        masked_linear(torch.randn(2, 64), torch.randn(48, 64), kept)
        gone = weakref.ref(kept)
        del kept
        assert gone() is None
    finally:
        gc.enable()


def test_threads_and_instruction_sets_have_decisions_of_their_own(isa):
    kept, call = pattern(), Call(8, True)
    threads = torch.get_num_threads()
    try:
        plans = []
        for count in (1, 2):
            torch.set_num_threads(count)
            plans.append(plan_for("masked_linear", kept, "native", call))
    finally:
        torch.set_num_threads(threads)
    assert plans[0] is not plans[1] and plans[0]._key != plans[1]._key
    assert f"/{isa}/" in plans[0]._key


def test_backends_without_sparse_kernels_run_dense():
    kept = pattern()
    with tscnc_kernels.use_backend("reference"):
        masked_linear(torch.randn(2, 64), torch.randn(48, 64), kept)
    (plan,) = plans_of(kept)
    assert plan.preview("forward").algorithm == "dense"
    assert plan.preview("forward").reason == "nothing else runs here"
