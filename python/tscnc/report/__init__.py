"""The page that shows what a run, or a comparison of runs, gained: one file, no network."""

from tscnc.report.page import write_report

__all__ = ["write_report"]
