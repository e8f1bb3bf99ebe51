"""Another attack on the views that a run saved: ``RUN/attacks/<name>``, beside the run's own.

What the run left stays as it was.  The new folder has a scenario, an environment, reconstructions
and a report of its own, and links to the capture: views, vault and what the federation did.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from fedsim import reconstructions
from fedsim.adversary import reconstruct, used_in_crafting
from fedsim.attack import Active
from fedsim.errors import ScenarioError
from fedsim.parts import Parts, check
from fedsim.registry import nearest
from fedsim.run_folder import RunFolder, interruptible, plainly
from fedsim.scenario import change
from fedsim.threat import THREAT_MODELS, Capability, least_model
from fedsim.view import SavedViews

_CAPTURE = ("views", "vault", "federation.json")
_OPEN = ("threat-model", "oracles", "audit.criterion")


def attack_again(
    run: RunFolder, expression: str, changes: Mapping[str, Any], command: str
) -> RunFolder:
    """Let another attack work on a run's capture; return the folder that awaits its report.

    ``changes`` maps scenario keys to values: who knows what, and how the auditor judges.  All else
    was settled when the views were saved.

    Raises
    ------
    ScenarioError
        Before the attack starts: if it is none, cannot work on this capture, or knows less than
        whoever made the capture, or if a change concerns the capture.
    RunFailed
        If the attack fails, or reaches for what it must not see.
    NotGranted
        If the attack asks for what its threat model does not grant.
    """
    with plainly(run):
        _check_changes(changes, expression)
        if (run.path / "views").is_symlink():
            remedy = "this is an attack on a run's capture; name the run's folder itself"
            raise ScenarioError("run", str(run.path), remedy)
        title = f"{run.scenario.title}: {expression}"
        parts = Parts(
            run.scenario.with_changes(**{**changes, "attack": expression, "title": title})
        )
        attack = parts.attack
        if attack is None:
            raise ScenarioError("attack", expression, "name an attack; see fedsim list attacks")
        _check_capture(parts, run)
        captured = SavedViews(run.path / "views")
        check(parts, here=False, captured=captured)  # no client is going to run
        run.gather_vault()
        into = _folder(run, parts, changes, expression, command)
    with interruptible(into):
        reconstruct(parts, attack, run, into)
    return into


def _check_changes(changes: Mapping[str, Any], expression: str) -> None:
    for key, value in changes.items():
        if key == "attack":
            remedy = f"the attack is the one named after the run, {expression!r}; leave this out"
            raise ScenarioError(key, value, remedy)
        if key.startswith("attack."):
            written = change({"attack": expression}, key, value)["attack"]
            remedy = f"an attack's parameters stand in its expression here; write {written!r}"
            raise ScenarioError(key, value, remedy)
        if key not in _OPEN:
            remedy = f"the capture is fixed, run it anew for this; {nearest(key, list(_OPEN))}"
            raise ScenarioError(key, value, remedy)


def _check_capture(parts: Parts, run: RunFolder) -> None:
    """Refuse an attack that did not make this capture, or a letter that could not have."""
    text, letter = parts.scenario.attack, parts.scenario.threat_model
    if isinstance(parts.attack, Active) and parts.attack != Parts(run.scenario).attack:
        made_by = f"the capture was made by another attack ({run.scenario.attack})"
        raise ScenarioError("attack", text, f"{made_by}, and this one changes what clients get; "
                            "run it anew with fedsim run")  # fmt: skip
    crafted = frozenset(Capability(name) for name in used_in_crafting(run))
    if lacking := sorted(need.value for need in crafted - THREAT_MODELS[letter]):
        remedy = f"the capture was made with {', '.join(lacking)}; the least threat model is "
        raise ScenarioError("threat-model", letter, f"{remedy}{least_model(crafted)}")


def _folder(
    run: RunFolder, parts: Parts, changes: Mapping[str, Any], expression: str, command: str
) -> RunFolder:
    given = [f"{key}={value}" for key, value in sorted(changes.items())]
    into = RunFolder(run.path / "attacks" / reconstructions.slug(" ".join([expression, *given])))
    into.path.mkdir(parents=True, exist_ok=True)
    for name in _CAPTURE:
        link = into.path / name
        if not link.is_symlink():
            link.symlink_to(f"../../{name}")
    repeat = shlex.join(["fedsim", "attack", str(run.path), expression, *given])
    into.write_scenario(parts.scenario)
    into.write("environment.json", {**run.environment, "command": command, "repeat": repeat})
    return into
