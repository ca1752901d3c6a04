"""The report: one page that needs nothing else, says everything, and escapes what it is given."""

import copy
import html.parser
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tscnc.config import TrainConfig
from tscnc.report import figures, svg, tables, write_report
from tscnc.report.runs import runs_of
from tscnc.run_folder import RunFolder, RunFolderError

VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "rect"}


class Page(html.parser.HTMLParser):
    """The tags and the text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def layer(name: str, kappa: float | None, density: float) -> dict[str, Any]:
    return {
        "name": name,
        "shape": [4, 3],
        "density": density,
        "effective_density": density / 2,
        "dead_rows": 1,
        "dead_columns": 0,
        "structural_rank": 3,
        "sigma_max": 2.0,
        "sigma_min_full": 0.0,
        "sigma_min_structural": 0.25,
        "kappa_full": None,
        "kappa_structural": kappa,
        "singular_values": [2.0, 0.25, 0.0],
        "singular_values_before": [3.0, 2.0, 1.0] if density < 1 else None,
    }


def results(label: str, pgd: float, kappa: float | None, density: float = 0.1) -> dict[str, Any]:
    pruned = density < 1
    return {
        "label": label,
        "dataset": "digits",
        "model": "mlp-4",
        "seed": 3,
        "epsilon": 0.1,
        "threat": "Linf",
        "accuracy": {"clean": 0.9, "pgd": pgd, "pgd_steps": 20, "examples": 400},
        "accuracy_vs_epsilon": [
            {"epsilon": 0.0, "accuracy": 0.9},
            {"epsilon": 0.1, "accuracy": pgd},
        ],
        "sparsity": {
            "direct": 1 - density,
            "effective": 1 - density / 2,
            "direct_compression": 1 / density,
            "effective_compression": None if pruned else 1.0,
        },
        "layers": [layer("1.weight", kappa, density), layer("3.weight", 4.0, density)],
        "seconds_per_step": {
            "dense_masked": 0.004,
            "ours": 0.001,
            "ratio": 4.0,
            "pairs": 21,
            "dropped": 2,
            "threads": 1,
        }
        if pruned
        else None,
        "checkpoint_bytes": {"dense": 50_000, "ours": 5_000 if pruned else 50_000},
    }


def write_run(path: Path, content: dict[str, Any]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(path)
    folder.config.write_text(TrainConfig().to_yaml())
    folder.environment.write_text(json.dumps({"torch": "2.13.0", "kernels": {"isa": "avx2"}}))
    folder.results.write_text(json.dumps(content))
    records = [
        {"phase": "pretrain", "epoch": 1, "loss": 2.0, "clean_accuracy": 0.5, "pgd_accuracy": 0.4},
        {"phase": "prune", "epoch": 1, "kept": 7, "clean_accuracy": 0.2, "pgd_accuracy": 0.1},
        {"phase": "finetune", "epoch": 1, "loss": 1.0, "clean_accuracy": 0.9, "pgd_accuracy": 0.8},
    ]
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", results("90 % pruned", 0.7, 8.0))


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    runs = {
        "dense": results("dense", 0.8, 2.0, density=1.0),
        "pruned": results("90 % pruned", 0.75, None),
        "tscnc": results("90 % pruned, TSC + CNC", 0.7, 8.0),
    }
    top = tmp_path / "comparison"
    for name, content in runs.items():
        write_run(top / name, content)
    RunFolder(top).config.write_text(TrainConfig().to_yaml())
    RunFolder(top).results.write_text(json.dumps({"runs": runs}))
    return top


def page_of(path: Path) -> Page:
    return Page(write_report(path).read_text(encoding="utf-8"))


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes long; tests of the numbers do without."""
    monkeypatch.setattr(figures, "figures", lambda runs: "")


@pytest.mark.parametrize("kind", ["single", "comparison"])
def test_the_page_needs_nothing_else(kind: str, request: pytest.FixtureRequest) -> None:
    run = request.getfixturevalue(kind)
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    for _, attributes in page.tags:
        for name in ("href", "src", "xlink:href", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and "http" not in text
    assert "$" not in text


def test_the_pictures_refer_to_what_is_on_the_page_and_take_its_colours(comparison: Path) -> None:
    text = write_report(comparison).read_text(encoding="utf-8")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert used and set(used) <= set(ids)
    drawn = text[text.index("</style>") :]
    assert "#0a0a0" not in drawn
    for name in ("ink", "muted", "run-1", "run-2", "run-3"):
        assert f"var(--{name})" in drawn
        assert text.count(f"--{name}:") == 2


def test_a_comparison_shows_every_plot_and_every_run(comparison: Path) -> None:
    page = page_of(comparison)
    assert page.count("svg") == 2 + 3 + 3
    for words in (
        "(a) dense",
        "(b) 90 % pruned",
        "(c) 90 % pruned, TSC + CNC",
        "PGD-20 accuracy against ε",
        "Compression",
        "1.weight, 4×3",
        "Loss",
        "kernels.isa",
        "cnc_form",
        "2 disturbed pairs left out",
    ):
        assert words in page.text, words
    assert page.count("details") == 3 + 2


def test_what_is_worse_is_said(comparison: Path, no_plots: None) -> None:
    text = write_report(comparison).read_text(encoding="utf-8")
    found = re.findall(r'<dt class="(\w+)">\1</dt><dd>(.*?)</dd>', text)
    assert found == [
        ("better", "structural κ of 1.weight"),
        ("same", "clean accuracy; structural κ of 3.weight; full κ of 1.weight, 3.weight"),
        ("worse", "PGD accuracy"),
    ]
    assert '<td class="verdict worse">−5.0 points</td>' in text
    assert '<td class="verdict better">finite now</td>' in text


def test_a_slower_step_is_called_slower(single: Path, no_plots: None) -> None:
    assert re.search(r"4×\s*faster", page_of(single).text)
    content = RunFolder(single).read_results()
    content["seconds_per_step"]["ratio"] = 0.5
    RunFolder(single).results.write_text(json.dumps(content))
    assert re.search(r"2×\s*slower", page_of(single).text)


def test_what_is_infinite_reads_as_such(comparison: Path) -> None:
    text = page_of(comparison).text
    assert "∞" in text
    assert not re.search(r"\b(nan|inf|None|null)\b", text.split("Details")[0])


def test_everything_from_files_is_escaped(single: Path) -> None:
    evil = "<script>alert('&')</script>\"$title"
    content = RunFolder(single).read_results()
    content["label"] = content["dataset"] = content["model"] = content["threat"] = evil
    content["layers"][0]["name"] = evil
    RunFolder(single).results.write_text(json.dumps(content))
    RunFolder(single).environment.write_text(json.dumps({evil: evil}))
    RunFolder(single).config.write_text(evil)
    page = page_of(single)
    assert page.count("script") == 0
    assert page.text.count("alert('&')") >= 6


def test_missing_files_are_named_on_the_page(single: Path) -> None:
    RunFolder(single).metrics.unlink()
    RunFolder(single).environment.unlink()
    page = page_of(single)
    assert "Missing or unreadable: metrics.jsonl, environment.json." in page.text
    assert page.count("svg") == 5


def test_a_cut_line_of_metrics_ends_the_curves(single: Path) -> None:
    with RunFolder(single).metrics.open("a") as file:
        file.write('{"phase": "fine')
    run = runs_of(RunFolder(single), RunFolder(single).read_results())[0]
    assert [record["phase"] for record in run.metrics] == ["pretrain", "prune", "finetune"]


def test_runs_without_usable_results_are_refused(single: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no results\.json"):
        write_report(tmp_path)
    content = RunFolder(single).read_results()
    for broken in ({}, {"runs": {}}, {"runs": []}, {**content, "layers": 3}):
        RunFolder(single).results.write_text(json.dumps(broken))
        with pytest.raises(RunFolderError, match="does not hold the results of a run"):
            write_report(single)
    assert not RunFolder(single).report.exists()


def test_without_matplotlib_the_page_names_the_package(
    single: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("matplotlib", "matplotlib.figure", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    page = page_of(single)
    assert page.count("svg") == 0
    assert "pip install matplotlib" in page.text and "clean" in page.text
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_page_is_the_same_every_time(comparison: Path) -> None:
    first = write_report(comparison).read_bytes()
    assert write_report(comparison).read_bytes() == first


def test_a_run_with_nothing_left_is_drawn(single: Path) -> None:
    content = copy.deepcopy(RunFolder(single).read_results())
    for each in content["layers"]:
        each |= {"density": 0.0, "effective_density": 0.0, "kappa_structural": None}
        each["singular_values"] = [0.0, 0.0, 0.0]
        each["singular_values_before"] = None
    content["accuracy"]["pgd"] = 0.0
    RunFolder(single).results.write_text(json.dumps(content))
    assert "Zeros among 3: 3." in page_of(single).text


def test_numbers_are_written_for_readers() -> None:
    written = {0.0: "0", 1.0: "1.00", 99.98: "100", 1234.5: "1,230", 0.01234: "0.0123"}
    assert {value: tables.number(value) for value in written} == written
    assert tables.number(4.56e7) == "4.56·10⁷"
    assert tables.number(9.999e-7) == "1.00·10⁻⁶"
    assert tables.number(math.inf) == "∞"
    assert [tables.factor(x) for x in (1.0, 99.98, 0.749, math.inf)] == [
        "1×",
        "100×",
        "0.749×",
        "∞",
    ]
    assert tables.points(0.7, 0.75) == "−5.0 points"
    assert [tables.times(*pair) for pair in ((2.0, 6.0), (6.0, 2.0))] == [
        "÷\u00a03.00",
        "×\u00a03.00",
    ]


def test_ticks_of_logarithmic_axes() -> None:
    assert svg.decades(0.5, 2000.0) == [1.0, 10.0, 100.0, 1000.0]
    assert svg.decades(1.2, 6.0) == [1.5, 2.0, 3.0, 4.0, 5.0]
    assert len(svg.decades(1e-12, 10.0)) <= 6
    assert svg.decades(3.1, 3.2) == [3.1]
    labels = [svg.power_of_ten(tick) for tick in (0.001, 0.01, 0.5, 1000.0, 1e4, 2e5)]
    assert labels == ["10⁻³", "0.01", "0.5", "1000", "10⁴", "2·10⁵"]


def test_rounding_noise_counts_as_zero() -> None:
    assert svg.without_rounding([2.0, 1e-3, 3e-16]) == [2.0, 1e-3, 0.0]
    assert svg.without_rounding([0.0, 0.0]) == [0.0, 0.0]


def test_an_accuracy_within_its_standard_error_is_neither_better_nor_worse() -> None:
    near, far = (
        tables.Row("", "", "", [0.9, 0.95, new], tables.percent, tables.points, noise=0.01)
        for new in (0.956, 0.97)
    )
    assert tables.verdict(near) == ("same", "+0.6 points")
    assert tables.verdict(far) == ("better", "+2.0 points")
    run = {"accuracy": {"clean": 0.9, "examples": 400}}
    assert tables.standard_error(run, "clean") == pytest.approx(0.015)
