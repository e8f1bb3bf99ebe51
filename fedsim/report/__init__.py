"""The report: ``report.json`` for programs and one offline page for people."""

from pathlib import Path

from fedsim.audit.schema import Report
from fedsim.files import write_atomically
from fedsim.report.page import render
from fedsim.report.pairs import choose

__all__ = ["write"]


def write(folder: Path, report: Report) -> Path:
    """Write ``report.json`` and ``report.html`` into a run folder; return the page's path.

    Raises
    ------
    RunFailed
        If a deposit that is to be shown does not open.
    OSError
        If the disk is full; each file is whole or as it was.
    """
    content = report.model_dump_json(indent=1, by_alias=True)
    write_atomically(folder / "report.json", content + "\n")
    page = folder / "report.html"
    write_atomically(page, render(report, choose(folder, report)))
    return page.absolute()
