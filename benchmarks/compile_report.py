"""Compiles every GPU kernel without a GPU, and tabulates registers, shared memory and spills.

    python -m benchmarks.compile_report [--json FILE] [--arch 80 90]

Triton kernels come from the `VARIANTS` of `tscnc_kernels/triton/*.py`, CUDA kernels from
`csrc/cuda/*.cu` where nvcc is found, or from what `setup.py` made of them if nothing has changed
since. Exits with 1 if a kernel spills registers or does not compile.
Runs in a process of its own, because TRITON_INTERPRET=1, which the tests set, leaves no kernel to
compile.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90)


@dataclasses.dataclass(frozen=True)
class Row:
    """What the assembler says of one kernel on one architecture.

    instructions: the distinct global and shared memory, tensor-core and local-memory opcodes.
    """

    source: str
    kernel: str
    arch: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int
    instructions: tuple[str, ...]


@dataclasses.dataclass
class Usage:
    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0


def make_row(
    source: str, kernel: str, arch: int, usage: Usage, instructions: tuple[str, ...]
) -> Row:
    """What the log and the listing say together."""
    return Row(
        source=source,
        kernel=kernel,
        arch=arch,
        registers=usage.registers,
        shared_bytes=usage.shared_bytes,
        stack_bytes=usage.stack_bytes,
        spill_bytes=usage.spill_bytes,
        instructions=instructions,
    )


def parse_ptxas(log: str) -> dict[tuple[str, int], Usage]:
    """Usage by (mangled kernel name, architecture) from the log of `ptxas -v`."""
    usages: dict[tuple[str, int], Usage] = {}
    usage = Usage()
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)a?'", line):
            usage = usages.setdefault((match[1], int(match[2])), Usage())
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) .* stores, (\d+) .* loads", line):
            # A function that the kernel calls has a line of its own.
            usage.stack_bytes += int(match[1])
            usage.spill_bytes += int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", line):
            usage.registers = int(match[1])
            usage.shared_bytes = int(match[2] or 0)
    return usages


# Opcodes of interest: of global, shared and local memory and of tensor cores.
OPCODE = re.compile(r"\s((?:LD[GSL]|ST[GSL]|[DHI]?G?MMA|LDGSTS|UTMA)\S*)\s")


def opcodes_in(listing: str) -> tuple[str, ...]:
    """The distinct ones of a listing of one kernel."""
    return tuple(sorted(set(OPCODE.findall(listing))))


def parse_sass(listing: str) -> dict[tuple[str, int], tuple[str, ...]]:
    """Opcodes of interest by (mangled kernel name, architecture) from `cuobjdump -sass`."""
    opcodes: dict[tuple[str, int], set[str]] = {}
    arch, found = 0, set[str]()
    for line in listing.splitlines():
        if match := re.search(r"code for sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function : (\S+)", line):
            found = opcodes.setdefault((match[1], arch), set())
        else:
            found.update(OPCODE.findall(line))
    return {key: tuple(sorted(names)) for key, names in opcodes.items()}


def demangle(names: Sequence[str]) -> list[str]:
    """C++ names as `kernel<arguments>`, without namespaces and parameters."""
    if not names or shutil.which("c++filt") is None:
        return list(names)
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    plain = [name.replace("(anonymous namespace)::", "") for name in run.stdout.splitlines()]
    return [re.sub(r"^void |tscnc::(cuda::)?|\(.*$", "", name) for name in plain]


def find_tool(name: str) -> str | None:
    """A CUDA binary: from the triton package, which ships some, else the toolkit's."""
    try:
        from triton.backends import nvidia

        shipped = Path(next(iter(nvidia.__path__))) / "bin" / name
        if shipped.exists():
            return str(shipped)
    except ImportError:
        pass
    return shutil.which(name)


def find_nvcc() -> str | None:
    """Path of nvcc, or None."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc") or shutil.which(
        "/usr/local/cuda/bin/nvcc"
    )


def sass(path: Path) -> dict[tuple[str, int], tuple[str, ...]]:
    """Opcodes of every kernel in a cubin or fatbin; empty without cuobjdump."""
    tool = find_tool("cuobjdump")
    if tool is None:
        return {}
    run = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True)
    return parse_sass(run.stdout)


def built(source: Path, archs: Sequence[int]) -> tuple[str, Path] | None:
    """The assembler's log and the object of a build that is newer than every source."""
    newest = max(
        path.stat().st_mtime
        for folder in ("cuda", "include")
        for path in (ROOT / "csrc" / folder).iterdir()
    )
    for log in ROOT.glob(f"build/native-*/cuda_{source.name}.o.ptxas"):
        text, binary = log.read_text(), log.with_suffix("")
        has_all = {arch for _, arch in parse_ptxas(text)} >= set(archs)
        if has_all and binary.exists() and min(map(_time_of, (log, binary))) > newest:
            return text, binary
    return None


def _time_of(path: Path) -> float:
    return path.stat().st_mtime


def compile_cuda(source: Path, nvcc: str, archs: Sequence[int], folder: Path) -> tuple[str, Path]:
    """The assembler's log of a .cu file for all architectures, and the binary."""
    fatbin = folder / f"{source.stem}.fatbin"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    options = ["-std=c++17", "-O3", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command = [nvcc, "-fatbin", *options, *codes, str(source), "-o", str(fatbin)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return run.stderr, fatbin


def cuda_rows(source: Path, nvcc: str, archs: Sequence[int], folder: Path) -> list[Row]:
    """The kernels of one .cu file on all architectures."""
    log, binary = built(source, archs) or compile_cuda(source, nvcc, archs, folder)
    usages, opcodes = parse_ptxas(log), sass(binary)
    usages = {key: usage for key, usage in usages.items() if key[1] in archs}
    kernels = demangle([name for name, _ in usages])
    return [
        make_row(source.name, kernel, arch, usage, opcodes.get((name, arch), ()))
        for ((name, arch), usage), kernel in zip(usages.items(), kernels, strict=True)
    ]


def multiples_of_16(variant: Any, kinds: Mapping[str, Any]) -> Iterator[tuple[int, ...]]:
    """Where a variant's pointers and multiples of 16 are among the parameters of its kernel."""
    for place, name in enumerate(variant.kernel.arg_names):
        kind = kinds[name]
        if isinstance(kind, tuple) and kind[0][0] == "*":
            yield from ((place, index) for index in range(len(kind)))
        elif kind[0] == "*" or name in variant.multiples_of_16:
            yield (place,)


def archs_for(variant: Any, archs: Sequence[int]) -> Sequence[int]:
    """Architectures between which a Triton kernel differs: strict float32 takes no tensor core, so
    that its instructions and its shared memory are the same on all, and the newest one says it.
    """
    return archs if is_distinct(variant.name) else [max(archs)]


def is_distinct(name: str) -> bool:
    """Whether a Triton kernel of this name differs between architectures."""
    return "[fp32" not in name


def assemble(kernel: Any, log: str, folder: Path) -> tuple[Usage, tuple[str, ...]]:
    """Usage and opcodes of a compiled Triton kernel; `log` is empty if Triton had it already."""
    cubin = folder / "kernel.cubin"
    if not parse_ptxas(log):
        ptx = folder / "kernel.ptx"
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target (\S+?)(?:,|$)", kernel.asm["ptx"], re.MULTILINE)
        assert target is not None
        ptxas = find_tool("ptxas") or "ptxas"
        command = [ptxas, "-v", f"--gpu-name={target[1]}", str(ptx), "-o", str(cubin)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    cubin.write_bytes(kernel.asm["cubin"])
    (usage,) = parse_ptxas(log).values()
    usage.shared_bytes = max(usage.shared_bytes, kernel.metadata.shared)
    tool = find_tool("nvdisasm")
    if tool is None:
        return usage, ()
    # Faster than cuobjdump, which calls it.
    listing = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True)
    return usage, opcodes_in(listing.stdout)


def triton_rows(module_name: str, archs: Sequence[int], folder: Path) -> Iterator[Row]:
    """Compiles the `VARIANTS` of one module of `tscnc_kernels.triton`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.nvidia.dump_ptxas_log = True
    module = importlib.import_module(f"tscnc_kernels.triton.{module_name}")
    for variant in module.VARIANTS:
        names = variant.kernel.arg_names
        kinds = {name: variant.arguments.get(name, "constexpr") for name in names}
        attributes = {path: [["tt.divisibility", 16]] for path in multiples_of_16(variant, kinds)}
        for arch in archs_for(variant, archs):
            with contextlib.redirect_stdout(io.StringIO()) as log:
                kernel = triton.compile(
                    ASTSource(variant.kernel, kinds, dict(variant.constants), attributes),
                    target=GPUTarget("cuda", arch, 32),
                    options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
                )
            usage, opcodes = assemble(kernel, log.getvalue(), folder)
            yield make_row(f"triton/{module_name}.py", variant.name, arch, usage, opcodes)


def collect(archs: Sequence[int] = ARCHITECTURES) -> tuple[list[Row], list[str]]:
    """All rows, and notes on what this machine cannot compile."""
    rows: list[Row] = []
    notes: list[str] = []
    nvcc = find_nvcc()
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu")) if nvcc else []
    if nvcc is None:
        notes.append("nvcc was not found: no CUDA kernel compiled")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        # nvcc works in processes of its own while this one compiles the Triton kernels.
        jobs = [pool.submit(cuda_rows, source, nvcc or "", archs, folder) for source in sources]
        if importlib.util.find_spec("triton") is None:
            notes.append("triton is not installed: no Triton kernel compiled")
        else:
            package = importlib.import_module("tscnc_kernels.triton")
            for module in pkgutil.iter_modules(package.__path__):
                if not module.name.startswith("_"):
                    rows += triton_rows(module.name, archs, folder)
        for job in jobs:
            rows += job.result()
    return sorted(rows, key=lambda row: (row.source, row.kernel, row.arch)), notes


def table(rows: Iterable[Row]) -> str:
    """The rows as text, one line per kernel and architecture."""
    lines = [f"{'source':<28}{'arch':>6}{'regs':>6}{'shared':>8}{'stack':>7}{'spills':>8}  kernel"]
    for row in rows:
        lines.append(
            f"{row.source:<28}{'sm_' + str(row.arch):>6}{row.registers:>6}{row.shared_bytes:>8}"
            f"{row.stack_bytes:>7}{row.spill_bytes:>8}  {row.kernel}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows into this file too")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    options = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)
    rows, notes = collect(options.arch)
    print(table(rows), *notes, sep="\n")
    if options.json:
        content = {"rows": [dataclasses.asdict(row) for row in rows], "notes": notes}
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, options.json)
    spilling = sorted({row.kernel for row in rows if row.spill_bytes})
    print(f"{len(rows)} builds, {len(spilling)} kernels spill registers", *spilling)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
