"""Builds `tscnc_kernels._C` with one ninja run.

CPU kernels (`csrc/cpu/*.cpp`) are compiled once per instruction set and chosen at run time. CUDA
kernels (`csrc/cuda/*.cu`) are compiled whenever nvcc is found and linked into the same library,
which also loads on a machine without a GPU. Environment variables:

TSCNC_WITH_CUDA=0|1     leave CUDA out, or fail when nvcc is missing (default: use nvcc if found)
TORCH_CUDA_ARCH_LIST    CUDA architectures, e.g. "8.0;9.0+PTX" (the default)
TSCNC_SANITIZE=1        AddressSanitizer and UBSan in the CPU code, without CUDA and with
                        AVX-512's code made of AVX2 instructions (`make sanitize`)
MAX_JOBS                parallel compile jobs
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
TORCH_TARGET_VERSION = "0x020b000000000000"  # stable ABI of torch 2.11
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
WIDE = "wide"
BF16 = "avx512_bf16"
ISA_FLAGS = {"portable": []}
if platform.machine() in {"x86_64", "AMD64"}:
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"]
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
    # AVX-512's code made of AVX2 instructions, for the tests: in development builds beside AVX-512,
    # in sanitized ones in its place.
    ISA_FLAGS[WIDE] = [*avx2, "-DTSCNC_WIDE_VECTORS", "-Wno-psabi"]
    ISA_FLAGS["avx2"] = avx2
    ISA_FLAGS["avx512"] = [*avx2, *avx512]
    # What adds dot products of bfloat16 to AVX-512: the files *_bf16.cpp alone.
    ISA_FLAGS[BF16] = [*avx2, *avx512, "-mavx512bf16"]


SANITIZE_FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def source_digest() -> str:
    """Hash of every native source, compiled in so that a stale binary is recognised at import."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in SOURCE_SUFFIXES:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def find_nvcc() -> str | None:
    """Path of nvcc, or None for a CPU-only build."""
    wanted = os.environ.get("TSCNC_WITH_CUDA")
    if wanted not in {None, "", "0", "1"}:
        sys.exit(f"TSCNC_WITH_CUDA must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [
        *(f"{home}/bin/nvcc" for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    nvcc = next((found for name in candidates if (found := shutil.which(name))), None)
    if nvcc is None and wanted == "1":
        sys.exit("TSCNC_WITH_CUDA=1, but nvcc was not found: put it on PATH or set CUDA_HOME")
    return nvcc


def cuda_include_flags(nvcc: str) -> list[str]:
    """The toolkit's include flags as nvcc itself states them (nvcc may be a wrapper script)."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-E", "x.cu"], capture_output=True, text=True)
    lines = re.findall(r"#\$ (?:SYSTEM_)?INCLUDES=(.*)", dry_run.stderr)
    flags = re.findall(r'"([^"]*)"', " ".join(lines))
    if not flags:
        sys.exit(f"{nvcc} --dryrun printed no include path:\n{dry_run.stderr}")
    return flags


def cuda_architectures() -> list[str]:
    """Architectures as nvcc names them: ["sm_80", "sm_90", "compute_90"]; compute_* is PTX."""
    names = []
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS):
        match = re.fullmatch(r"(\d+)\.(\d+[a-z]?)(\+PTX)?", entry)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 9.0+PTX, got {entry!r}")
        number = match[1] + match[2]
        names += [f"sm_{number}"] + ([f"compute_{number}"] if match[3] else [])
    return names


class NinjaBuild(build_ext):
    """Writes build.ninja for the sources in csrc/ and runs it; ninja does what is out of date."""

    def run(self) -> None:
        import ninja
        from ninja.ninja_syntax import Writer

        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.sanitize = SANITIZE_FLAGS if os.environ.get("TSCNC_SANITIZE") == "1" else []
        kind = "develop" if self.inplace else "release"
        self.build_dir = ROOT / "build" / f"native-{kind}-{tag}"
        self.build_dir.mkdir(parents=True, exist_ok=True)
        self.nvcc = None if self.sanitize else find_nvcc()
        archs = cuda_architectures() if self.nvcc else []
        left_out = {"avx512", BF16} if self.sanitize else set() if self.inplace else {WIDE}
        self.isas = [isa for isa in ISA_FLAGS if isa not in left_out]
        cuda = " ".join(archs) or "none (nvcc not found, or TSCNC_WITH_CUDA=0)"
        print(f"tscnc_kernels: CPU {' '.join(self.isas)}; CUDA {cuda}")
        self.write_config(archs)
        with open(self.build_dir / "build.ninja", "w") as file:
            self.write_rules(Writer(file, width=1000), archs)
        jobs = os.environ.get("MAX_JOBS")
        command = [os.path.join(ninja.BIN_DIR, "ninja"), *(["-j", jobs] if jobs else [])]
        if subprocess.run(command, cwd=self.build_dir).returncode:
            sys.exit("tscnc_kernels: the native build failed; the compiler's message is above")
        self.install_library()

    def write_config(self, archs: list[str]) -> None:
        """Header with what only library.cpp reports; rewritten only when it changes."""
        values = {
            "TSCNC_VERSION": self.distribution.get_version(),
            "TSCNC_SOURCE_DIGEST": source_digest(),
            "TSCNC_CPU_ISAS": " ".join(self.isas),
            "TSCNC_CUDA_ARCHS": " ".join(archs),
        }
        text = "".join(f'#define {name} "{value}"\n' for name, value in values.items())
        path = self.build_dir / "build_config.h"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)

    def write_rules(self, ninja, archs: list[str]) -> None:
        import pybind11
        from torch.utils import cpp_extension

        includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}", f"-I{self.build_dir}"]
        system = [
            *cpp_extension.include_paths(),
            pybind11.get_include(),
            sysconfig.get_path("include"),
        ]
        torch_includes = [f"-isystem{path}" for path in system]
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
        # gcc warns of uninitialised variables inside its own AVX-512 intrinsics.
        common += ["-Wno-maybe-uninitialized"]
        # No kernel reads errno or traps; without these flags gcc leaves comparisons scalar.
        common += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        common += self.sanitize
        if WIDE in self.isas:
            common += ["-DTSCNC_WITH_WIDE"]
        if self.sanitize:
            common += ["-DTSCNC_EMULATE_AVX512"]
        host = [*common, *includes, *torch_includes]
        host.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
        if self.nvcc:
            host += ["-DTSCNC_WITH_CUDA", *cuda_include_flags(self.nvcc)]
        compiler = os.environ.get("CXX", "g++")
        ninja.rule(
            "cxx",
            f"{compiler} -MD -MF $out.d $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
            description="CXX $out",
        )
        objects = []

        def compile_file(rule: str, source: Path, label: str, flags: list[str]) -> None:
            name = f"{source.relative_to(ROOT / 'csrc').with_suffix('')}{label}.o".replace("/", "_")
            objects.extend(
                ninja.build(name, rule, str(source), variables={"flags": shlex.join(flags)})
            )

        for source in sorted((ROOT / "csrc").glob("*.cpp")):
            compile_file("cxx", source, "", host)
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            unused = {"portable", "avx2", "avx512"} if source.stem.endswith("_bf16") else {BF16}
            for isa in [isa for isa in self.isas if isa not in unused]:
                flags = [*common, *includes, *ISA_FLAGS[isa], f"-DTSCNC_ISA={isa}"]
                compile_file("cxx", source, f".{isa}", flags)
        if self.nvcc:
            self.write_cuda_rule(ninja, archs)
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
                compile_file("nvcc", source, ".cu", includes)
        self.write_link_rule(ninja, cpp_extension.library_paths(), objects, compiler)

    def write_cuda_rule(self, ninja, archs: list[str]) -> None:
        codes = [f"-gencode=arch=compute_{arch.split('_')[1]},code={arch}" for arch in archs]
        flags = "-std=c++17 -O3 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden --threads 0"
        nvcc = shlex.quote(self.nvcc)
        # What the assembler says of registers and spills is kept for benchmarks/compile_report.py.
        log = "> $out.ptxas 2>&1 || { cat $out.ptxas; exit 1; }; grep warning $out.ptxas || true"
        flags += " -Xptxas -v"
        command = f"{nvcc} -MD -MF $out.d {flags} {' '.join(codes)} $flags -c $in -o $out {log}"
        ninja.rule("nvcc", command, depfile="$out.d", deps="gcc", description="NVCC $out")

    def write_link_rule(
        self, ninja, torch_paths: list[str], objects: list[str], compiler: str
    ) -> None:
        torch_libraries = shlex.join([f"-L{path}" for path in torch_paths]) + " -ltorch -ltorch_cpu"
        if self.nvcc:
            # nvcc knows where its static runtime is; -cudart static keeps libcudart out of the
            # requirements.
            nvcc = shlex.quote(self.nvcc)
            linker = f"{nvcc} -ccbin {compiler} -shared -cudart static -Xlinker --as-needed"
        else:
            linker = shlex.join([compiler, "-shared", "-Wl,--as-needed", *self.sanitize])
        command = f"{linker} $in {torch_libraries} -o $out"
        ninja.rule("link", command, description="LINK $out")
        ninja.build("_C.so", "link", objects)
        ninja.default("_C.so")

    def install_library(self) -> None:
        """Put the library in place in one step, so that a running process never sees half of it."""
        name = self.extensions[0].name
        if self.inplace:
            target = ROOT / self.get_ext_filename(name)
        else:
            target = Path(self.get_ext_fullpath(name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".tmp{os.getpid()}")
        shutil.copy2(self.build_dir / "_C.so", temporary)
        os.replace(temporary, target)


setup(ext_modules=[Extension("tscnc_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
