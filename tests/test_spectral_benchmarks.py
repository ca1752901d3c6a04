"""Providers of the spectral benchmarks pass their gates, and their targets name what exists."""

from dataclasses import replace

import pytest
import torch

from benchmarks import (
    bench_cnc_step,
    bench_conv_spectrum,
    bench_extreme_singular_values,
    bench_gram_iteration,
    summary,
    targets,
)
from benchmarks.bench_conv_spectrum import Layer
from benchmarks.gate import disagreement
from benchmarks.harness import Timed, UnavailableError
from benchmarks.results import Row
from tests.test_benchmarks import ROW

CPU = torch.device("cpu")
SMALL = Layer(6, 4, 3, 8)


def first_result(case, provider):
    arguments = case.inputs(torch.Generator().manual_seed(0), CPU)
    try:
        timed = provider.prepare(case, *arguments)
    except UnavailableError as reason:
        return str(reason)
    if not isinstance(timed, Timed):
        timed = Timed(timed, lambda result: result)
    return timed.outputs(timed.call())


@pytest.mark.parametrize("mode", [*bench_conv_spectrum.CIRCULAR_MODES, "max"])
@pytest.mark.parametrize("provider", bench_conv_spectrum.PROVIDERS, ids=lambda p: p.name)
def test_providers_of_convolution_spectra_agree_or_say_why_not(mode, provider):
    case = bench_conv_spectrum._case(SMALL, mode)
    found = first_result(case, provider)
    if isinstance(found, str):
        assert "only" in found
        return
    expected = case.expected(*case.inputs(torch.Generator().manual_seed(0), CPU))
    # Fifty steps of the power method are not enough for the promised error.
    tolerance = 0.1 if provider.name.startswith("power") else case.tolerance
    assert disagreement(found, expected, tolerance) is None


def test_warm_cases_walk_with_the_state_of_the_call_before():
    case = bench_conv_spectrum._case(SMALL, "warm")
    _, kernels, states = case.inputs(torch.Generator().manual_seed(0), CPU)
    assert len(kernels) == len(states) == bench_conv_spectrum.WALK
    for before, kernel, state in zip(kernels, kernels[1:], states[1:], strict=False):
        remembered = state[-before.numel() :].reshape(before.shape)
        torch.testing.assert_close(remembered, before.detach().double())
        step = (kernel - before).norm() / kernel.norm()
        assert step.item() == pytest.approx(bench_conv_spectrum.WARM_STEP, rel=0.1)


@pytest.mark.parametrize("provider", bench_gram_iteration.PROVIDERS, ids=lambda p: p.name)
def test_providers_of_spectral_norms_agree_or_say_why_not(provider):
    case = bench_gram_iteration._case((1, 24, 40), "forward")
    found = first_result(case, provider)
    expected = case.expected(*case.inputs(torch.Generator().manual_seed(0), CPU))
    assert isinstance(found, str) or disagreement(found, expected, case.tolerance) is None


def test_a_step_with_penalties_is_the_plain_step_and_more():
    (case,) = bench_cnc_step.QUICK
    expected = case.expected(*case.inputs(torch.Generator().manual_seed(0), CPU))
    for provider in bench_cnc_step.PROVIDERS:
        found = first_result(case, provider)
        if provider.gated:
            assert disagreement(found, expected, case.tolerance) is None
    rows = [
        replace(ROW, backend=name, p50=p50)
        for name, p50 in (("step", 2.0), ("step with TSC + CNC", 2.5), ("TSC + CNC alone", 0.4))
    ]
    with_both, alone = bench_cnc_step.shares(rows)
    assert with_both.endswith("+25.0 % of a step") and alone.endswith("+20.0 % of a step")


def test_spectral_targets_name_providers_and_are_held_against_the_best():
    benches = {
        "extreme_singular_values": bench_extreme_singular_values,
        "conv_spectrum": bench_conv_spectrum,
        "gram_iteration": bench_gram_iteration,
    }
    for target in targets.SPECTRAL:
        names = {provider.name for provider in benches[target.op].PROVIDERS}
        assert {target.ours, *target.peers} <= names, target.name
        cases = {
            (case.mode, case.shape, str(case.dtype), case.sparsity)
            for case in benches[target.op].CASES
        }
        wanted = (target.mode, target.shape, f"torch.{target.dtype}", target.sparsity)
        assert wanted in cases, target.name

    def row(backend: str, p50: float) -> Row:
        return replace(
            ROW, op="conv_spectrum", shape="64-64-3x3-on-32", sparsity=0.0, backend=backend, p50=p50
        )

    rows = [
        row("conv_singular_values", 10.0),
        row("half spectrum + svdvals", 30.0),
        row("full fft + svdvals", 90.0),
    ]
    (line,) = summary.spectral(summary.Times(rows), only_measured=True)[2:]
    assert "cold" in line and "3/3.5 !" in line


def test_float64_cases_are_held_against_float64_peers():
    case = bench_extreme_singular_values._case([(24, 40)], "24x40", "forward", dtype=torch.float64)
    expected = case.expected(*case.inputs(torch.Generator().manual_seed(0), CPU))
    for provider in bench_extreme_singular_values.PROVIDERS:
        found = first_result(case, provider)
        if provider.name == "gram32 + eigvalsh":
            assert found == "not in the precision asked for"
        elif not isinstance(found, str):
            assert disagreement(found, expected, case.tolerance) is None
            assert found[0].dtype == torch.float64
