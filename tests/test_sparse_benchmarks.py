"""Every provider of the sparse layers passes its gate, and the table of targets reads right."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_masked_chain,
    bench_masked_conv2d,
    bench_masked_linear,
    bench_roofline,
    bench_sparsity_pattern,
    bench_train_step,
    harness,
    limits,
    masked_linear_gpu,
    peers,
    plot,
    results,
    summary,
    targets,
)
from benchmarks.bench_masked_conv2d import Shape
from benchmarks.harness import Case, Provider, UnavailableError
from benchmarks.networks import NETWORKS, Network, macs
from benchmarks.targets import Target
from tests.test_benchmarks import ROW

CPU = torch.device("cpu")
MODES = ("forward", "forward_backward")


def gated(case: Case, providers: list[Provider]) -> set[str]:
    """The providers that agree with float64; those that cannot run are left out."""
    found = set()
    for provider in providers:
        generator = torch.Generator().manual_seed(0)
        arguments = case.inputs(generator, CPU)
        try:
            timed = harness._timed(provider, case, arguments)
        except UnavailableError:
            continue
        outputs = timed.outputs(timed.call())
        if provider.gated:
            reason = harness.disagreement(outputs, harness._expected(case, CPU), 1e-5)
            assert reason is None, f"{provider.name}: {reason}"
        found.add(provider.name)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(16, 48, 32), (5, 7, 3), (1, 64, 48)])
def test_every_linear_provider_agrees(mode, shape):
    found = gated(bench_masked_linear.case(shape, 0.8, mode), bench_masked_linear.PROVIDERS)
    assert {"ours, values", "ours, dense weight", "ours, panel", "ours, dense"} <= found
    assert {"F.linear", "F.linear(W * mask)", "torch.sparse.mm CSR", "condensed gather"} <= found
    assert ("MKL CSR, feature-major" in found) == (mode == "forward")
    assert ("(N, K) gradient fill" in found) == (mode == "forward_backward")


def test_half_precision_has_its_own_dense_baselines():
    case = bench_masked_linear.case((16, 48, 32), 0.8, "forward", torch.bfloat16)
    problem = case.inputs(torch.Generator().manual_seed(0), CPU)[0]
    want = case.expected(problem)
    for adapter in (peers.dense, peers.dense_in_fp32):
        timed = peers.inference(problem, adapter(problem))
        assert harness.disagreement(timed.outputs(timed.call()), want, 1.6e-2) is None
    with pytest.raises(UnavailableError, match="fp32"):
        peers.sparse_mm(problem)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape",
    [Shape(8, 6, 8), Shape(8, 4, 5, 6, stride=2), Shape(8, 8, 4, kernel=1)],
    ids=lambda shape: shape.name,
)
def test_every_convolution_provider_agrees(mode, shape):
    found = gated(bench_masked_conv2d.case(shape, 0.8, mode), bench_masked_conv2d.PROVIDERS)
    assert {"ours, values", "ours, dense weight", "ours, plane", "ours, dense"} <= found
    assert {"F.conv2d", "F.conv2d(W * mask)"} <= found


@pytest.mark.parametrize("what", ["output", "weight gradient"])
def test_a_wrong_provider_is_caught(what, capsys, monkeypatch):
    monkeypatch.setattr(harness.machine, "control", lambda *_: lambda: 1.0)

    def wrong(case, problem):
        layer = peers.dense(problem)
        if what == "output":
            shifted = replace(layer, apply=lambda x: layer.apply(x) + 1e-3)
        else:
            # As if two kept weights had swapped their gradients.
            shifted = replace(layer, kept=lambda g: layer.kept(g).roll(1))
        return peers.training(problem, shifted)

    case = bench_masked_linear.case((16, 48, 32), 0.8, "forward_backward")
    assert harness.run_case(case, [Provider("wrong", wrong)], CPU, 1, harness.QUICK_ROUNDS) == []
    assert "not timed: WRONG" in capsys.readouterr().out


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: __import__("no_such_peer"))
    case = bench_masked_linear.case((16, 48, 32), 0.8, "forward")
    problem = case.inputs(torch.Generator().manual_seed(0), CPU)[0]
    with pytest.raises(UnavailableError, match=r"sparseprop is missing.*make bench-peers"):
        peers.sparseprop_linear(problem)


@pytest.mark.parametrize("mode", ["build", "update"])
def test_both_ways_to_index_a_mask_agree(mode):
    case = bench_sparsity_pattern._case((64, 40), 0.8, mode)
    beside = {"one forward"} if mode == "build" else set()
    found = gated(case, bench_sparsity_pattern.PROVIDERS)
    assert found == {"SparsityPattern", "torch ops"} | beside


@pytest.mark.parametrize("level", ["registers", "L1"])
def test_the_roofs_add_up(level):
    found = gated(bench_roofline._case(level), bench_roofline.PROVIDERS)
    if not found:
        pytest.skip("no C++ compiler")
    assert found == {"one core"}


def test_every_layer_of_a_small_step_agrees():
    network = Network("lenet-300-100", (1, 6, 6), 8)
    found = gated(bench_train_step.case(network, 0.9), bench_train_step.PROVIDERS[:3])
    assert found == {"ours", "dense, masked"}


def test_every_way_through_a_chain_of_layers_agrees():
    found = gated(bench_masked_chain._case((16, 48), 0.8), bench_masked_chain.PROVIDERS)
    assert {"ours, sparsify", "ours, layer by layer", "dense", "torch.sparse.mm CSR"} <= found


def test_free_convolutions_leave_everything_else():
    model = bench_train_step.networks.vgg16()
    images = torch.rand(2, 3, 32, 32)
    free = bench_train_step._free(model, {}, images)
    assert not [m for m in free.modules() if isinstance(m, torch.nn.Conv2d)]
    image = images.clone().requires_grad_()
    loss = free(image).sum()
    loss.backward()
    assert image.grad.shape == image.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in free.parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("vgg-16", 313.2), ("resnet-18", 555.4), ("mlp-2048", 10.01)]
)
def test_networks_have_the_work_of_their_papers(name, millions):
    network = next(n for n in NETWORKS if n.name == name)
    assert macs(network.build(), network.input_shape) / 1e6 == pytest.approx(millions, rel=0.01)


TARGET = Target(
    "faster", "scale", ("theirs", "others"), {"8x8": 0.5}, (1, *[None] * 6, 8), "forward"
)


def times(**p50: float) -> summary.Times:
    rows = [replace(ROW, backend=name, sparsity=0.999, p50=t) for name, t in p50.items()]
    return summary.Times(rows)


def test_a_cell_compares_with_the_best_peer_and_marks_what_is_below():
    target = replace(TARGET, ours="ours")
    cells = {
        1.0: "6/4",
        2.0: "3/4 !",
    }
    for ours, cell in cells.items():
        (line,) = summary.table(times(ours=ours, theirs=9.0, others=6.0), [target])[2:]
        assert [c.strip() for c in line.split("|")][3:-1] == ["missing", *["-"] * 6, cell]


def test_a_reached_target_is_not_marked_by_rounding():
    assert summary._cell(5.996, 6) == "6/6"
    assert summary._cell(5.94, 6) == "5.94/6 !"


def test_unmeasured_lines_are_left_out_of_a_quick_table():
    assert summary.table(times(theirs=1.0), [TARGET], only_measured=True) == []


def test_slower_than_dense_and_rising_times_are_reported():
    base = replace(ROW, op="masked_linear", backend="F.linear", p50=2.0)
    ours = replace(base, backend="ours, values")
    short = replace(base, shape="short", p50=0.5)
    rows = [
        base,
        replace(ours, p50=2.1),
        short,
        replace(short, backend="ours, values", p50=0.52),
        replace(ours, sparsity=0.95, p50=2.3),
    ]
    found = summary.Times(rows)
    (slow,) = summary.slower_than_dense(found)
    assert "8x8" in slow and "2.1 ms, dense 2 ms" in slow
    (rising,) = summary.rising_times(found)
    assert "2.1 ms at 0.9, 2.3 ms at 0.95" in rising


def test_a_missed_cell_is_held_against_the_roofs():
    rows = [
        replace(ROW, op="roofline", backend="one core", shape=level, threads=1, rate=rate)
        for level, rate in (("L1", 50.0), ("L2", 40.0), ("L3", 20.0), ("DRAM", 10.0))
    ]
    cell = {
        "op": "masked_linear",
        "mode": "forward_backward",
        "shape": "128x2048x2048",
        "dtype": "float32",
        "sparsity": 0.9,
        "threads": 1,
    }
    rows += [
        replace(ROW, **cell, backend="F.linear", p50=40.0),
        replace(ROW, **cell, backend="ours, values", p50=8.0, rate=40.0),
    ]
    # x, y, dy, x and dx of 128 x 2048 floats at 10 G/s take 0.131 ms.
    line = "linear vs dense 128x2048x2048 at 0.9: 8 ms, products 80% (L1) to 100% (L2), layout 2%"
    assert list(limits.below_target(rows)) == [line]
    assert list(limits.below_target([*rows[:-1], replace(rows[-1], p50=4.0)])) == []
    assert list(limits.below_target(rows[1:])) == []


def test_rebuilds_are_held_against_one_forward_too():
    build = replace(ROW, op="sparsity_pattern", mode="build", dtype="bool", sparsity=0.9)
    build = replace(build, shape="2048x2048", backend="SparsityPattern", p50=1.5)
    rows = [build, replace(build, shape="4096x4096", p50=8.5)]
    small, large = summary.rebuilds(summary.Times(rows))
    assert small.endswith("0.9: 1.5/2 ms") and large.endswith("8.5/8 ms !")
    rows += [replace(build, backend=n, p50=t) for n, t in (("one forward", 1.2), ("torch ops", 30))]
    small, _ = summary.rebuilds(summary.Times(rows))
    assert small.endswith("1.5/1.2 ms !, torch ops 30 ms")


def test_the_share_of_the_ceiling_is_of_the_same_dense_step():
    step = replace(ROW, op="train_step", mode="pgd10_step", shape=targets.VGG, sparsity=0.99)
    named = {"dense, masked": 60.0, summary.UNFUSED: 12.0, "free convolutions": 8.0}
    rows = [replace(step, backend=name, p50=t) for name, t in named.items()]
    assert bench_train_step.UNFUSED == summary.UNFUSED
    (line,) = summary.other_targets(summary.Times(rows))
    assert "5 of the 7.5" in line and "0.67/0.8 !" in line


def test_every_target_names_a_case_and_providers_that_exist():
    benches = (bench_masked_linear, bench_masked_conv2d, bench_train_step)
    cases = {(c.op, c.mode, c.shape, c.sparsity) for b in benches for c in b.CASES}
    names = {p.name for b in benches for p in b.PROVIDERS}
    for target in targets.TABLE:
        assert {target.ours, *target.peers} <= names, target.name
        for shape in target.shapes:
            for s in targets.SPARSITIES:
                if target.at(shape, s) is not None:
                    assert (target.op, target.mode, shape, s) in cases, (target.name, shape, s)


def test_the_figures_of_a_sparse_op_are_drawn_from_its_rows(tmp_path: Path):
    pytest.importorskip("matplotlib")
    base = replace(ROW, op="masked_linear", mode="forward_backward", shape="128x2048x2048")
    rows = [
        replace(base, backend=name, sparsity=s, p50=t / (1 if name == "F.linear" else s))
        for name, t in (("F.linear", 4.0), ("ours, values", 1.0), ("SparseProp", 2.0))
        for s in (0.5, 0.9, 0.99)
    ]
    roof = replace(ROW, op="roofline", backend="one core", mode="multiply_add", sparsity=0.0)
    roofs = [replace(roof, shape="registers", rate=90.0), replace(roof, shape="L2", rate=40.0)]
    results.save([*rows, *roofs], tmp_path)
    figures = plot.plot_file(tmp_path / "cpu-test" / "masked_linear.csv")
    assert [f.name for f in figures] == ["masked_linear-speedup.svg", "masked_linear-roofline.svg"]
    assert "as fast as dense" in figures[0].read_text()
    assert "registers: 90" in figures[1].read_text()


def test_providers_of_the_gpu_agree_with_float64():
    case = bench_masked_linear.case((20, 24, 16), 0.5, "forward_backward")
    ours = {"ours, values", "ours, dense weight", "ours, panel", "ours, dense"}
    dense = {"F.linear", "F.linear(W * mask)"}
    found = gated(case, masked_linear_gpu.PROVIDERS)
    assert found - {"ours, triton"} == ours | dense
    case = bench_masked_linear.case((1, 24, 16), 0.5, "forward")
    assert {"ours, spmv", "cuSPARSE CSR"} <= gated(case, masked_linear_gpu.PROVIDERS)
    case = bench_masked_linear.case((20, 96, 64), 0.5, "forward", block=16)
    assert {"ours, block", "torch BSR"} <= gated(case, masked_linear_gpu.PROVIDERS)


def test_a_gpu_has_cases_of_its_own(monkeypatch):
    measured = []
    monkeypatch.setattr(harness, "main", lambda cases, providers, *rest: measured.append(cases))
    bench_masked_linear.run(["--quick"])
    bench_masked_linear.run(["--quick", "--device", "cuda"])
    assert measured[0] is bench_masked_linear.CASES
    shapes = {case.shape for case in measured[1]}
    assert {case.shape for case in measured[1] if case.rotate} == {
        shape for shape in shapes if shape.endswith("-cold")
    }
    square, few = "4096x4096x4096", {"8x4096x11008", "1x4096x11008"}
    few |= {f"{shape}-cold" for shape in few}
    assert shapes == {square, f"{square}-b64", f"{square}-b128"} | few
