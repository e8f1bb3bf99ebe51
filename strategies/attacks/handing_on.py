"""What an attack does about the one that it hands on to."""

from torch import nn

from fedsim import registry
from fedsim.attack import Active, Attack, Manipulation, Setting
from fedsim.threat import Capability


def same_for_all(inner: Attack) -> bool:
    """Say whether an attack sends all clients one model, and neither chooses nor adds clients."""
    return (
        isinstance(inner, Manipulation)
        and type(inner).tailor is Manipulation.tailor
        and Capability.SELECTION not in inner.required
    )


class HandsOn(Attack):
    """An attack whose parameter ``then`` is the expression of another, which reads for it.

    What that one needs, asks for and refuses, so does this one; progress counts its units.  One
    with more to check calls these, and checks what is its own.
    """

    then: str

    def __post_init__(self) -> None:
        """Refuse a reader that does not exist (``ScenarioError``), or cannot read for it."""
        self.check_reader(self.inner)
        # A frozen dataclass has no other way.
        object.__setattr__(self, "unit", self.inner.unit)

    def check_reader(self, inner: Attack) -> None:
        """Refuse a reader that changes what clients get (``ValueError``)."""
        if isinstance(inner, Active):
            raise ValueError(f"then={self.then!r} must be passive: it reads what is there already")

    @property
    def inner(self) -> Attack:
        """The attack that reads."""
        built: Attack = registry.build("attack", self.then, f"attack: {self.name}(then)")
        return built

    @property
    def required(self) -> frozenset[Capability]:
        """What it needs, and what ``then`` does."""
        return self.needs | self.inner.required

    @property
    def oracles(self) -> frozenset[str]:
        """Those of ``then``."""
        return self.inner.oracles

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse what ``then`` refuses."""
        self.inner.check(model, kind)

    def check_setting(self, setting: Setting) -> None:
        """Refuse what ``then`` refuses."""
        self.inner.check_setting(setting)
