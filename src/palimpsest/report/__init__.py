"""Reports that a person reads: one self-contained HTML page of verdicts, charts and findings."""

from palimpsest.report.page import html_report, write_report

__all__ = ["html_report", "write_report"]
