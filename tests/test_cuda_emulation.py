"""The emulation of CUDA on the CPU computes what CUDA defines and reports what it leaves open."""

from collections.abc import Callable
from ctypes import c_int, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation.library import EmulatedLibrary, EmulationError

SOURCE = Path(__file__).parent / "cuda_emulation" / "example_kernels.cu"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    return EmulatedLibrary(SOURCE, tmp_path_factory.mktemp("emulation"))


def run(library: EmulatedLibrary, name: str, *arguments: Tensor | int) -> None:
    types = [c_void_p if isinstance(argument, Tensor) else c_int for argument in arguments]
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    library.call(library.function(name, c_int, *types), *values)


def in_every_order(
    library: EmulatedLibrary, name: str, output: Tensor, *arguments: Tensor | int
) -> Tensor:
    """The output of a kernel whose last argument it is, the same in every order of the threads."""

    def call() -> list[Tensor]:
        fresh = output.clone()
        run(library, name, *arguments, fresh)
        return [fresh]

    return library.run_in_every_order(call)[0]


def test_block_sum_adds_every_thread(library: EmulatedLibrary) -> None:
    values = torch.arange(3 * 128, dtype=torch.float64).sin()

    def call() -> list[Tensor]:
        sums = torch.empty(3, dtype=torch.float64)
        run(library, "block_sums", values, sums, 3)
        return [sums]

    (sums,) = library.run_in_every_order(call)
    torch.testing.assert_close(sums, values.view(3, 128).sum(1), rtol=1e-13, atol=1e-13)


def rotate(library: EmulatedLibrary, with_barrier: int) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        output = torch.empty(64)
        run(library, "rotate", torch.arange(64.0), output, with_barrier)
        return [output]

    return call


def test_barrier_makes_writes_of_other_threads_visible(library: EmulatedLibrary) -> None:
    (output,) = library.run_in_every_order(rotate(library, 1))
    assert torch.equal(output, torch.arange(64.0).roll(-1))


def test_missing_barrier_before_a_read_is_caught(library: EmulatedLibrary) -> None:
    with pytest.raises(AssertionError, match="a race"):
        library.run_in_every_order(rotate(library, 0))


@pytest.mark.parametrize("waits_for_all", [0, 1])
def test_asynchronous_copies_arrive_when_they_are_waited_for(
    library: EmulatedLibrary, waits_for_all: int
) -> None:
    source = torch.arange(64.0)
    found = torch.empty(64)
    run(library, "copy", source, found, waits_for_all)
    assert torch.equal(found[:32], source[:32])
    assert torch.equal(found[32:], source[32:]) == bool(waits_for_all)


def test_misaligned_asynchronous_copy_raises(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError, match="misaligned asynchronous copy"):
        run(library, "misaligned_copy", torch.zeros(16))


def test_missing_barrier_before_reuse_is_caught(library: EmulatedLibrary) -> None:
    with pytest.raises(AssertionError, match="a race"):
        in_every_order(library, "reuse", torch.empty(64), torch.arange(64.0))


def test_shared_memory_of_every_block_starts_as_nan(library: EmulatedLibrary) -> None:
    output = in_every_order(library, "unset_shared", torch.zeros(2, 64))
    assert torch.equal(output[0], torch.ones(64))
    assert output[1, 0] == 1
    assert output[1, 1:].isnan().all()


def test_misaligned_vector_load_raises(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError, match=r"example_kernels\.cu:\d+: misaligned address"):
        run(library, "misaligned_load", torch.zeros(16), torch.zeros(8))


def test_index_beyond_shared_array_raises(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError, match="array index out of bounds"):
        run(library, "out_of_bounds", torch.zeros(64))


def test_library_still_works_after_an_error(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError):
        run(library, "early_exit")
    library.run_in_every_order(rotate(library, 1))


def test_barrier_that_some_threads_skip_raises(library: EmulatedLibrary) -> None:
    with pytest.raises(
        EmulationError, match=r"3 left the kernel; 61 wait at __syncthreads in line \d+"
    ):
        run(library, "early_exit")


def test_two_different_barriers_raise(library: EmulatedLibrary) -> None:
    message = r"32 wait at __syncthreads in line \d+; 32 wait at __syncthreads in line \d+"
    with pytest.raises(EmulationError, match=message):
        run(library, "two_barriers")


def test_shuffle_that_lanes_of_its_mask_skip_raises(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError, match="16 wait at a warp operation"):
        run(library, "divergent_shuffle", torch.empty(32, dtype=torch.int32))


def test_warp_operations(library: EmulatedLibrary) -> None:
    output = in_every_order(library, "warp_operations", torch.zeros(32, 6, dtype=torch.int32))
    lanes = range(32)
    every_third = sum(1 << lane for lane in lanes if lane % 3 == 0)
    expected = [
        [-1 if lane >= 16 else lane + 3 if lane < 13 else lane for lane in lanes],
        [max(lane - 2, 0) if lane != 1 else 1 for lane in lanes],
        [lane // 8 * 8 + 5 for lane in lanes],
        [every_third] * 32,
        [16] * 32,
        [1] * 32,
    ]
    assert output.T.tolist() == expected


def test_every_thread_of_a_grid_runs_once(library: EmulatedLibrary) -> None:
    count = torch.zeros((), dtype=torch.int32)
    run(library, "count_threads", count, 5, 3)
    assert count.item() == 5 * 3 * 8 * 4 * 2


def test_dynamic_shared_memory(library: EmulatedLibrary) -> None:
    elements = torch.arange(96.0)
    run(library, "reverse", elements, 96, 4 * 96)
    assert torch.equal(elements, torch.arange(96.0).flip(0))


def test_write_beyond_dynamic_shared_memory_raises(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError, match="beyond its dynamic shared memory"):
        run(library, "reverse", torch.arange(96.0), 96, 4 * 95)


def test_large_dynamic_shared_memory_is_requested_before_the_launch(
    library: EmulatedLibrary,
) -> None:
    run(library, "reverse", torch.arange(96.0), 96, 200 * 1024)


@pytest.mark.parametrize(("threads", "shared_bytes"), [(0, 0), (1025, 0), (32, 228 * 1024)])
def test_impossible_launch_is_refused(
    library: EmulatedLibrary, threads: int, shared_bytes: int
) -> None:
    with pytest.raises(EmulationError, match="cudaError"):
        run(library, "reverse", torch.zeros(1), threads, shared_bytes)
