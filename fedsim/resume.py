"""Finishing a run whose reconstruction or report was cut off: ``fedsim resume RUN``."""

import json
from pathlib import Path

from fedsim.adversary import reconstruct
from fedsim.audit.run import Run, open_run
from fedsim.errors import ScenarioError
from fedsim.isolation import parent as isolation
from fedsim.parts import Parts, check
from fedsim.run import write_report
from fedsim.run_folder import RunFolder, interruptible, plainly
from fedsim.view import SavedViews


def resume(folder: RunFolder) -> Path:
    """Reconstruct with the run's own scenario where that is missing, then judge.

    What the attack kept when it was cut off it finds again.  Returns ``report.html``.

    Raises
    ------
    ScenarioError
        If the federation itself did not finish, or all is there.
    RunFailed
        As in the run itself.
    """
    run = open_run(folder.path)
    _check_unfinished(folder, run)
    with interruptible(folder):
        if _reconstruction_missing(run):
            parts = Parts(folder.scenario)
            assert parts.attack is not None
            captured = SavedViews(folder.path / "views")
            check(parts, here=False, captured=captured)  # no client is going to run
            isolation.prepare(parts.attack)
            with plainly(folder):
                folder.event("resumed")
                folder.gather_vault()
            reconstruct(parts, parts.attack, folder)
        with plainly(folder):
            folder.gather_vault()
        return write_report(folder)


def _check_unfinished(folder: RunFolder, run: Run) -> None:
    """Refuse what there is nothing to finish of, or too little to finish."""
    path = str(folder.path)
    if (folder.path / "views").is_symlink():
        remedy = "this is an attack on a run's capture; repeat it, and it goes on where it was"
        raise ScenarioError("run", path, f"{remedy}: {folder.environment.get('repeat')}")
    if not _told(run, "federated"):
        remedy = "its federation did not finish, and what clients did not send cannot be resumed"
        raise ScenarioError("run", path, f"{remedy}; run it anew: {folder.environment['repeat']}")
    if not _reconstruction_missing(run) and _report_is_whole(folder.path):
        remedy = f"all is there already: {folder.path / 'report.html'}; fedsim report judges again"
        raise ScenarioError("run", path, remedy)


def _reconstruction_missing(run: Run) -> bool:
    return run.attack is not None and not run.refused and not _told(run, "reconstructed")


def _report_is_whole(folder: Path) -> bool:
    """Say whether a report was written, after whatever it is about."""
    try:
        stopped = json.loads((folder / "report.json").read_text())["stopped"]
    except (OSError, ValueError, KeyError):
        return False
    return stopped is None and (folder / "report.html").is_file()


def _told(run: Run, event: str) -> bool:
    return any(told.get("event") == event for told in run.events)
