"""What every attack is: a paper, its needs, and one function from views to candidates."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from fedsim.threat import Capability, Knowledge, TrainingDetails
from fedsim.view import ServerView

if TYPE_CHECKING:
    from fedsim.channel import Channel


@dataclass(frozen=True)
class Paper:
    """Where a method comes from; ``published`` and ``measured`` are what `fedsim explain` prints.

    ``published`` gives the paper's own figures with their setting, ``measured`` ours with the
    command that repeats them and every difference in set-up.
    """

    title: str
    authors: str
    venue: str
    year: int
    published: str = ""
    measured: str = ""

    def cited(self) -> str:
        """Return authors, title, venue and year in a line."""
        return f"{self.authors}: {self.title}, {self.venue} {self.year}"


@dataclass(frozen=True)
class Cost:
    """What an attack cost: wall seconds and gradient evaluations."""

    seconds: float = 0.0
    gradient_evaluations: int = 0


@dataclass(frozen=True)
class Reconstruction:
    """Candidates for private examples.

    Attributes
    ----------
    examples : Tensor
        ``[M, C, H, W]`` in the data set's value range (images: ``[0, 1]``), on the CPU.
    views : Tensor
        ``[M]`` int64: index of the view that each candidate was read from.
    labels : Tensor or None
        ``[M]`` int64.
    scores : Tensor or None
        ``[M]``, the attack's own confidence (higher is surer), never the truth.
    cost : Cost
    receipts : tuple of str
        What the attack really did, in sentences for the report.
    present : Tensor or None
        ``[M]`` bool, of an attack that asks (``Attack.asks``): whether it says that this very
        example was among the data.  Such examples are judged as answers, and as nothing else.
    whose : Tensor or None
        ``[M]`` int64, beside ``present``: of which client it says so, -1 of all behind the view.
    """

    examples: Tensor
    views: Tensor
    labels: Tensor | None = None
    scores: Tensor | None = None
    cost: Cost = field(default_factory=Cost)
    receipts: tuple[str, ...] = ()
    present: Tensor | None = None
    whose: Tensor | None = None


@dataclass(frozen=True)
class ToyCase:
    """A small real scenario that every method must pass, on both sides of a band.

    ``scenario`` maps dotted scenario keys to values; what is not named has its default.  The
    figure (a path into ``report.json``, e.g. ``leak.psnr.mean``) must lie in ``[low, high]``:
    too bad and the method is broken, too good and the truth leaked.
    """

    scenario: dict[str, str | int | float | bool]
    figure: str
    low: float
    high: float


@dataclass(frozen=True)
class Setting:
    """The federation that a scenario asks for, for checks before it runs.

    ``model`` has its initial weights.  ``clients`` are its own, of which ``cohort`` train in a
    round; ``examples`` is how many each holds; ``batchnorm`` the scenario's policy; ``sybils`` are
    the attacker's own devices; ``here`` says whether clients run on this machine.
    """

    model: nn.Module
    clients: int
    cohort: int
    examples: tuple[int, ...]
    training: TrainingDetails
    batchnorm: str
    channel: "Channel"
    sybils: int = 0
    here: bool = True

    @property
    def uploads(self) -> list[int]:
        """Of how many examples each client's upload is, the fewest first."""
        one_batch = self.training.kind == "gradient"
        return sorted(min(n, self.training.batch_size) if one_batch else n for n in self.examples)


class Attack(ABC):
    """Passive: works on what honest clients send."""

    name: ClassVar[str]
    paper: ClassVar[Paper]
    needs: ClassVar[frozenset[Capability]]
    toy: ClassVar[ToyCase]
    #: What its progress counts, in the plural.
    unit: ClassVar[str] = "steps"
    #: Whether it asks who has examples that it holds (``Knowledge.known``): a test of membership.
    asks: ClassVar[bool] = False

    @property
    def required(self) -> frozenset[Capability]:
        """The capabilities that these parameters ask for: at least ``needs``."""
        return self.needs

    @property
    def oracles(self) -> frozenset[str]:
        """Names of the oracle grants that these parameters ask for."""
        return frozenset()

    @property
    def joins_rounds(self) -> bool:
        """Whether it takes the uploads of a client to be of the same examples every round."""
        return False

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a scenario on which this attack cannot work, before any client trains.

        Parameters
        ----------
        model : nn.Module
            The federation's model (``model.spec`` is its ``DataSpec``).
        kind : {"gradient", "weights"}
            What clients upload.

        Raises
        ------
        ValueError
            Saying what does not fit and what would.
        """

    def check_setting(self, setting: Setting) -> None:
        """Refuse a federation in which this attack cannot work, before any client trains.

        Raises
        ------
        ValueError
            Saying what does not fit and what would; a ``ScenarioError`` where another key than
            ``attack`` is to blame.
        """

    @abstractmethod
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Turn views into candidate private examples."""


@dataclass(frozen=True)
class ModelToSend:
    """A manipulated model: an expression any client can build, its arrays, and where ours lies.

    ``prefix`` is put before the names of the federation's own arrays inside the model sent
    (``"body."``), so that the federation's own learning goes on with what comes back.  ``places``
    says of an array that it is a block, ``(index, count)``, of a larger one (``fedsim.placing``).
    """

    expression: str
    arrays: dict[str, Tensor]
    prefix: str = ""
    places: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class Active(Attack):
    """Active: what clients get, or are asked, is not what an honest server would send."""


class Manipulation(Active):
    """Active: also decides what each client receives.

    What an adaptive attack learned in earlier rounds it reads off ``knowledge.history``: it keeps
    no state of its own, so that saved views are all that a later reconstruction needs.
    """

    @property
    def sybils(self) -> int:
        """How many devices of the attacker's own join the federation; needs ``SELECTION``.

        They follow the protocol as clients ``N .. N + sybils - 1`` and upload what changes
        nothing, with the weight of one example and no defense.
        """
        return 0

    @abstractmethod
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Turn the model that the strategy would send into the model that clients receive.

        ``expression`` and ``arrays`` are the honest model; called once a round, when
        ``knowledge.history`` holds the views of the rounds before.
        """

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        """Return what this client gets; by default all get the same.

        Arrays that are ``sent``'s own are stored once; others are made when a client is served, so
        that this must give the same whenever it is asked.
        """
        return sent

    def select(self, clients: Sequence[int], server_round: int) -> Sequence[int]:
        """Return the clients to train this round; needs ``Capability.SELECTION``.

        ``clients`` are those that are there, the attacker's own sybils last.
        """
        return clients
