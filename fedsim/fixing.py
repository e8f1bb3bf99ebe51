"""What to change in a scenario so that its defenses can act on its model."""

from fedsim.models import build_model
from fedsim.parts import Parts
from fedsim.scenario import Scenario


def fixes(scenario: Scenario) -> dict[str, str]:
    """Return dotted keys and the values that they should have; empty where nothing is wrong."""
    parts = Parts(scenario)
    expression = scenario.model.name
    for defense in parts.defenses:
        expression = defense.fitting(expression, build_model(expression, parts.spec))
    if expression == scenario.model.name:
        return {}
    changed = {"model.name": expression}
    if scenario.model.batchnorm != "frozen":
        changed["model.batchnorm"] = "frozen"  # there is none left to have a policy for
    return changed
