"""The page that shows what a run or a comparison gained."""

from __future__ import annotations

from pathlib import Path

from tscnc.files import write_text
from tscnc.run_folder import RunFolder
from tscnc.table import results_table


def write_report(run_dir: Path) -> Path:
    """Writes the report of a run folder or comparison and returns its path."""
    folder = RunFolder(run_dir)
    results = folder.read_results()
    write_text(folder.report, results_table(results.get("runs", {"run": results})))
    return folder.report
