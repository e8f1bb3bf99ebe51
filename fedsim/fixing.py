"""What to change in a scenario so that its defenses can act on its model."""

from collections.abc import Sequence

from fedsim.data import DataSpec
from fedsim.defense import Defense
from fedsim.errors import ScenarioError
from fedsim.models import build_model
from fedsim.parts import Parts
from fedsim.scenario import Scenario


def fixes(scenario: Scenario) -> dict[str, str]:
    """Return dotted keys and the values that they should have; empty where nothing is wrong.

    Raises
    ------
    ScenarioError
        If a defense puts into the network what another cannot carry: no model helps.
    """
    parts = Parts(scenario)
    expression = scenario.model.name
    for defense in parts.defenses:
        expression = _fitting(defense, expression, parts.spec)
    _refuse_clash(parts.defenses, expression, parts.spec, scenario.defenses)
    if expression == scenario.model.name:
        return {}
    changed = {"model.name": expression}
    if scenario.model.batchnorm != "frozen":
        changed["model.batchnorm"] = "frozen"  # there is none left to have a policy for
    return changed


def _fitting(defense: Defense, expression: str, spec: DataSpec) -> str:
    return defense.fitting(expression, build_model(expression, spec))


def _refuse_clash(defenses: Sequence[Defense], expression: str, spec: DataSpec, text: str) -> None:
    """Refuse a network that fits until a defense changes it."""
    for bringing in defenses:
        expression = bringing.architecture(expression)
        for other in defenses:
            if _fitting(other, expression, spec) != expression:
                remedy = (
                    f"{bringing.name} puts a layer into the network that {other.name} cannot carry "
                    "(BatchNorm), whatever the model; leave one of them out"
                )
                raise ScenarioError("defenses", text, remedy)
