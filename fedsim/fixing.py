"""What to change in a scenario so that its defenses can act on its model."""

from collections.abc import Sequence

from fedsim.data import DataSpec
from fedsim.defense import Defense
from fedsim.errors import ScenarioError
from fedsim.models import build_model
from fedsim.parts import Parts, check
from fedsim.scenario import Scenario


def fixes(scenario: Scenario) -> dict[str, str]:
    """Return dotted keys and the values that they should have; empty where nothing is wrong.

    Raises
    ------
    ScenarioError
        If a defense puts into the network what another cannot carry: no model helps.  If
        ``model.weights`` are of a network with BatchNorm: they fit no other.
    """
    parts = Parts(scenario)
    expression = scenario.model.name
    for defense in parts.defenses:
        expression = _fitting(defense, expression, parts.spec)
    _refuse_clash(parts.defenses, expression, parts.spec, scenario.defenses)
    if expression == scenario.model.name:
        return {}
    changed = {"model.name": expression}
    fixed = scenario.with_changes(**changed)
    _refuse_weights(parts, Parts(fixed))
    if (policy := _policy(fixed)) != scenario.model.batchnorm:
        changed["model.batchnorm"] = policy
    return changed


def _refuse_weights(parts: Parts, fixed: Parts) -> None:
    """Refuse weights that were saved of the network that cannot stay."""
    try:
        fixed.model()
    except ScenarioError as error:
        parts.model()  # refuses weights that did not fit before either
        remedy = (
            f"these weights are of a network with BatchNorm, {parts.scenario.model.name}, which "
            f"the defenses cannot carry, and do not fit {fixed.scenario.model.name}; leave "
            "model.weights out, or train that one anew and name its run"
        )
        raise ScenarioError("model.weights", parts.scenario.model.weights, remedy) from error


def _policy(fixed: Scenario) -> str:
    """Return the scenario's own policy for BatchNorm, of which nothing may be left, or another."""
    if (fault := _fault(fixed)) is None or fault.key != "model.batchnorm":
        return fixed.model.batchnorm
    others = [policy for policy in ("frozen", "private") if policy != fixed.model.batchnorm]
    passing = (
        policy
        for policy in others
        if _fault(fixed.with_changes(**{"model.batchnorm": policy})) is None
    )
    return next(passing, "frozen")


def _fault(scenario: Scenario) -> ScenarioError | None:
    try:
        check(Parts(scenario))
    except ScenarioError as error:
        return error
    return None


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
