"""Which defenses may stand in one chain, and in what order: checked before any client trains."""

from itertools import combinations, pairwise

from fedsim.defense import BELONGS_BEFORE, Defense, Rank, changes_uploads, has
from fedsim.errors import ScenarioError

Chain = tuple[Defense, ...]
_ACT_IN_TURN = ("gradient", "update")
#: Hooks of which one defense alone can have its way, and what comes of two.
_ONE_WAY = {
    ("gradients", "loss"): "compute the gradient in a way of their own, and only one would act",
    ("sampler",): "choose the batches, and the later one knows nothing of what the first chose",
}


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
    _check_replaced(defenses, text)
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
        if noising.rank < clipping.rank:  # nor may they change places
            remedy += "leave one out"
        elif earlier == later:
            remedy += f"write {clipping.name} before {noising.name}, or leave one out"
        else:
            remedy += f"clip where the noise is, at='{earlier}', or leave one out"
        raise ScenarioError("defenses", text, remedy)


def _check_sealed(defenses: Chain, text: str) -> None:
    """Refuse who would change an upload, here or at the server, that must arrive as it is."""
    for first, second in combinations(defenses, 2):
        acts = changes_uploads(second) or has(second, "strategy")
        if first.seals and acts:
            remedy = f"{second.name} must not follow {first.name}: {first.seals}"
            raise ScenarioError("defenses", text, remedy)


def _check_one_way(defenses: Chain, text: str) -> None:
    """Refuse two ways where there is one: two losses, a loss and a gradient, two samplers."""
    for hooks, outcome in _ONE_WAY.items():
        ways = [d.name for d in defenses if any(has(d, hook) for hook in hooks)]
        if len(ways) > 1:
            remedy = f"{ways[0]} and {ways[1]} each {outcome}; leave one out"
            raise ScenarioError("defenses", text, remedy)


def _check_replaced(defenses: Chain, text: str) -> None:
    """Refuse to make a gradient, or to change it, for who keeps nothing of it.

    Who makes it in a way of its own acts first, wherever it is written.
    """
    for place, last in enumerate(defenses):
        if not last.replaces_gradient:
            continue
        made = [d.name for d in defenses if has(d, "gradients")]
        changed = [d.name for d in defenses[:place] if has(d, "transform_gradient")]
        if made or changed:
            remedy = f"{last.name} would throw away what {(made + changed)[0]} did: it replaces "
            remedy += "the gradient, and is sound on the true one alone; "
            remedy += "leave one out" if made else f"write {last.name} before {changed[0]}"
            raise ScenarioError("defenses", text, remedy)
