"""Which defenses may stand in one chain, and in what order: checked before any client trains."""

from itertools import combinations, pairwise

from fedsim.defense import BELONGS_BEFORE, Defense, Rank, changes_uploads
from fedsim.errors import ScenarioError

Chain = tuple[Defense, ...]
_ACT_IN_TURN = ("gradient", "update")


def check_chain(defenses: Chain, text: str) -> None:
    """Refuse a chain in which some defense would void another, or be ignored.

    Raises
    ------
    ScenarioError
        Naming ``defenses``, whose expression is ``text``, and what would be right.
    """
    for first, second in pairwise(defenses):
        if first.rank > second.rank:
            remedy = f"{second.name} must come before {first.name}: {BELONGS_BEFORE[second.rank]}"
            raise ScenarioError("defenses", text, remedy)
    names = [defense.name for defense in defenses]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ScenarioError("defenses", text, f"{min(twice)} stands there twice")
    _check_one_way(defenses, text)
    _check_clipping(defenses, text)
    _check_sealed(defenses, text)


def _check_clipping(defenses: Chain, text: str) -> None:
    """Refuse to clip what has noise: every hook at the gradient acts before any at the update."""
    acting = [(place, defense) for place in _ACT_IN_TURN for defense in defenses]
    for (earlier, noising), (later, clipping) in combinations(acting, 2):
        if noising is clipping or (noising.noises, clipping.clips) != (earlier, later):
            continue
        remedy = f"{clipping.name} would clip the {later} after {noising.name} noised "
        remedy += f"the {earlier}: {BELONGS_BEFORE[Rank.CLIP]}; "
        if earlier == later:
            remedy += f"write {clipping.name} before {noising.name}, or leave one out"
        else:
            remedy += f"clip where the noise is, at='{earlier}', or leave one out"
        raise ScenarioError("defenses", text, remedy)


def _check_sealed(defenses: Chain, text: str) -> None:
    """Refuse who would change an upload, here or at the server, that must arrive as it is."""
    for first, second in combinations(defenses, 2):
        acts = changes_uploads(second) or type(second).strategy is not Defense.strategy
        if first.seals and acts:
            remedy = f"{second.name} must not follow {first.name}: {first.seals}"
            raise ScenarioError("defenses", text, remedy)


def _check_one_way(defenses: tuple[Defense, ...], text: str) -> None:
    """Refuse two ways to one gradient: of two losses, or a loss and a gradient, one is ignored."""
    ways = [
        defense.name
        for defense in defenses
        if type(defense).gradients is not Defense.gradients
        or type(defense).loss is not Defense.loss
    ]
    if len(ways) > 1:
        remedy = (
            f"{ways[0]} and {ways[1]} each compute the gradient in a way of their own, and only "
        )
        raise ScenarioError("defenses", text, f"{remedy}one would act; leave one out")
