"""The rules of the house, checked on every file: a rule nobody checks is not a rule."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tscnc_kernels
from tscnc_kernels import _backend

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(_backend._registry)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
SOURCE_FOLDERS = ("tscnc_kernels", "python", "csrc", "benchmarks", "tests")
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def sources(*suffixes: str, below: tuple[str, ...] = SOURCE_FOLDERS) -> list[Path]:
    files = [ROOT / "setup.py"] if below is SOURCE_FOLDERS else []
    for folder in below:
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in (suffixes or SUFFIXES)]
    return sorted(files)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_files_stay_short():
    lengths = {name(path): len(path.read_text().splitlines()) for path in sources()}
    assert {k: n for k, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_functions_stay_short():
    too_long = {}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_KERNEL_LINES if "triton" in path.parts else MAX_FUNCTION_LINES
                doc = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(doc.splitlines())
                if lines > limit:
                    too_long[f"{name(path)}:{node.name}"] = lines
    assert too_long == {}


BANNED = {
    "banner comment": r"^\s*(#|//)\s*[-=*#]{4,}",
    "unfinished work": r"\b(TODO|FIXME|XXX)\b|NotImplementedError",
    "commented-out code": r"^\s*#\s*(def |class |import |from \w+ import|return\b|if .*:$)",
    "test switched off": r"pytest\.mark\.xfail|assert True",
}


@pytest.mark.parametrize("what", BANNED)
def test_banned_text_is_absent(what):
    pattern = re.compile(BANNED[what], re.MULTILINE)
    files = [path for path in sources() if path != Path(__file__).resolve()]
    found = [name(path) for path in files if pattern.search(path.read_text())]
    assert found == []


def test_kernels_never_import_the_training_layer():
    pattern = re.compile(r"^\s*(from|import) tscnc\b(?!_)", re.MULTILINE)
    found = [p for p in sources(".py", below=("tscnc_kernels",)) if pattern.search(p.read_text())]
    assert found == []


def test_cuda_sources_include_no_torch_header():
    pattern = re.compile(r"#include\s*[<\"](torch/(?!headeronly)|ATen|c10)")
    cuda = sources(".cu", ".cuh", ".h", below=("csrc/cuda",))
    assert cuda, "csrc/cuda is empty"
    assert [name(p) for p in cuda if pattern.search(p.read_text())] == []


def test_every_cuda_source_is_run_without_a_gpu():
    stems = {path.stem for path in sources(".cu", below=("csrc/cuda",))}
    tested = {path.stem for path in (ROOT / "tests/cuda").glob("test_*_cuda.py")}
    assert {f"test_{stem}_cuda" for stem in stems} - tested == set()


def test_tested_triton_kernels_are_not_autotuned():
    files = sources(".py", below=("tscnc_kernels/triton",))
    assert [name(p) for p in files if "autotune" in p.read_text()] == []


def test_only_the_registered_names_are_public():
    for public in tscnc_kernels.__all__:
        assert hasattr(tscnc_kernels, public), public


SECTIONS = [
    r'^"""',
    r"^BACKENDS = ",
    r"^def _check\(",
    r"^def reference\(",
    r"^def reference_backward\(",
    r"^@torch\.library\.register_fake\(",
    r"^class \w+Function\(torch\.autograd\.Function\)",
]


# A step of an optimizer works in place and has no derivative.
STEP_SECTIONS = [
    r'^"""',
    r"^BACKENDS = ",
    r"^def _check\(",
    r"^def reference_\w+\(",
    r"^@torch\.library\.register_fake\(",
]


def is_step(op: str) -> bool:
    return op.endswith("_step")


def stem(op: str) -> str:
    """The basename of an op's files; the steps of all optimizers share theirs."""
    return "masked_optimizer" if is_step(op) else op


@pytest.mark.parametrize("op", OPS)
def test_an_op_file_tells_its_story_in_order(op):
    path = ROOT / f"tscnc_kernels/ops/{stem(op)}.py"
    text = path.read_text()
    places = []
    for section in [*(STEP_SECTIONS if is_step(op) else SECTIONS), rf"^def {op}\("]:
        match = re.search(section, text, re.MULTILINE)
        assert match, f"{name(path)} has no section {section}"
        places.append(match.start())
    assert places == sorted(places), f"{name(path)}: sections out of order"
    docstring = ast.get_docstring(ast.parse(text))
    assert "Source:" in docstring, f"{name(path)} cites no source"


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_complete(op):
    for pattern in (
        f"csrc/{stem(op)}.cpp",
        f"csrc/cpu/{stem(op)}.cpp",
        f"csrc/cpu/{stem(op)}.h",
        f"tests/ops/test_{stem(op)}.py",
        f"benchmarks/bench_{stem(op)}.py",
    ):
        assert (ROOT / pattern).exists(), f"{op}: {pattern} is missing"
    assert f"`{op}`" in (ROOT / "README.md").read_text(), f"{op} has no row in the README"


@pytest.mark.parametrize("op", OPS)
def test_preferred_backends_cite_a_committed_result(op):
    text = (ROOT / f"tscnc_kernels/ops/{stem(op)}.py").read_text()
    comment = re.search(r"((?:^#.*\n)+)BACKENDS = ", text, re.MULTILINE)
    cited = re.search(r"benchmarks/results/\S+\.csv", comment[1] if comment else "")
    assert cited, f"{op}: the comment above BACKENDS must cite a file of benchmarks/results"
    assert list(ROOT.glob(cited[0])), f"{op}: {cited[0]} does not exist"


def public_functions() -> list[str]:
    names = tscnc_kernels.__all__
    return [n for n in names if inspect.isfunction(getattr(tscnc_kernels, n))]


@pytest.mark.parametrize("function", public_functions())
def test_public_docstrings_are_complete(function):
    target = getattr(tscnc_kernels, function)
    doc = inspect.getdoc(target) or ""
    assert doc.splitlines()[0].endswith("."), f"{function}: first line must be a sentence"
    if inspect.signature(target).parameters:
        for section in ("Args:", "Returns:", "Raises:"):
            assert section in doc, f"{function} documents no {section}"
        for parameter in inspect.signature(target).parameters:
            assert re.search(rf"\b{parameter}\b.*:", doc), f"{function}: {parameter} undocumented"


def test_isa_objects_share_no_inline_code():
    """A function emitted by an AVX-512 object must not replace the portable one at link time."""
    objects = sorted(ROOT.glob("build/native-*/cpu_*.*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("no object files of an in-place build, or no nm")
    for path in objects:
        isa = path.name.split(".")[-2]
        listing = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True)
        weak = re.findall(r"^\w* +[WVu] (.*)$", listing.stdout, re.MULTILINE)
        foreign = [symbol for symbol in weak if f"tscnc::{isa}::" not in symbol]
        assert foreign == [], f"{path.name} emits weak symbols outside its namespace: {foreign}"


TRAINING_LAYER_ALONE = """
import builtins, sys
allowed = {*sys.stdlib_module_names, "torch", "numpy", "tscnc", "tscnc_kernels", *sys.modules}
real = builtins.__import__
def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {}).get("__name__", "")
    if level == 0 and importer.split(".")[0] in {"tscnc", "tscnc_kernels"}:
        if name.split(".")[0] not in allowed:
            raise ImportError(f"{importer} imports {name}")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = guarded
import tscnc.cli
"""


def test_training_layer_imports_with_torch_and_numpy_alone():
    result = subprocess.run(
        [sys.executable, "-c", TRAINING_LAYER_ALONE],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"},
    )
    assert result.returncode == 0, result.stderr
