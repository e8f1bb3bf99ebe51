"""The eight threat models of the SoK, and what each lets an attack know.

Carletti et al., "SoK: Gradient Inversion Attacks in Federated Learning", USENIX Security 2025.
A model is a set of capabilities.  :class:`Knowledge` is an attack's only source beside the views:
what is not granted raises :class:`~fedsim.errors.NotGranted`, what is used is recorded for the
report.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from fedsim import seeds
from fedsim.checkpoints import Checkpoint, Checkpoints, named, plain
from fedsim.data import DataSpec, Split
from fedsim.errors import NotGranted
from fedsim.models import build_model, load_arrays
from fedsim.models.statistics import LayerStatistics
from fedsim.view import Blanked, SavedViews, ServerView


class Capability(StrEnum):
    """One thing an adversary may hold or do."""

    UPDATES = "updates"
    BASICS = "basics"
    DETAILS = "details"
    SURROGATE = "surrogate"
    STATISTICS = "statistics"
    MANIPULATION = "manipulation"
    SELECTION = "selection"


_U, _B, _D, _S, _ST, _M, _SE = Capability
THREAT_MODELS: dict[str, frozenset[Capability]] = {
    "A": frozenset({_U}),
    "B": frozenset({_U, _B}),
    "C": frozenset({_U, _B, _D}),
    "D": frozenset({_U, _B, _D, _S}),
    "E": frozenset({_U, _B, _D, _S, _ST}),
    "F": frozenset({_U, _B, _D, _M}),
    "G": frozenset({_U, _B, _D, _S, _M}),
    "H": frozenset({_U, _B, _D, _S, _M, _SE}),
}
NAMES = {
    "A": "eavesdropper",
    "B": "informed eavesdropper",
    "C": "parameter-aware eavesdropper",
    "D": "data-enhanced eavesdropper",
    "E": "statistics-informed eavesdropper",
    "F": "active manipulator",
    "G": "data-enhanced manipulator",
    "H": "active client manipulator",
}
# What a paper assumes beyond its threat model; granted only by name, shown as a badge.
# ``labels``: those of the batch behind a view.  ``batchnorm``: its mean and variance in each layer.
ORACLES = ("labels", "batchnorm")


def least_model(needs: frozenset[Capability]) -> str | None:
    """Return the letter of the smallest threat model that has all of ``needs``."""
    fitting = [letter for letter, has in THREAT_MODELS.items() if needs <= has]
    return min(fitting, key=lambda letter: len(THREAT_MODELS[letter]), default=None)


@dataclass(frozen=True)
class Basics:
    """What an informed eavesdropper knows of the task."""

    data: DataSpec


@dataclass(frozen=True)
class TrainingDetails:
    """How honest clients train.

    ``kind`` is ``"gradient"`` (one step, FedSGD) or ``"weights"`` (FedAvg); ``lr`` the local rate.
    """

    kind: str
    lr: float
    batch_size: int
    epochs: int
    momentum: float
    weight_decay: float


@dataclass(frozen=True)
class Statistics:
    """What a statistics-informed adversary holds of one client: its class distribution ``[K]``."""

    class_distribution: Tensor


def _unwatched(done: int, total: int, text: str) -> None:
    """Tell nobody."""


class Knowledge:
    """An attack's only source beside the views; every grant that was used is recorded.

    What the threat model does not grant is not merely refused: it is not in here.

    Attributes
    ----------
    device : torch.device
        Where the attack computes.
    clients : int
        How many clients there are, the attacker's sybils not counted: any server knows.
    known : tuple of Tensor
        ``[C, H, W]`` float64 in ``[0, 1]``: private images that the attacker holds too, by the
        scenario's ``data.known``; whose they are is what it asks.
    progress : callable
        ``progress(done, total, text)``: tell whoever watches how far the attack is.
    """

    def __init__(
        self,
        threat_model: str,
        *,
        data: DataSpec,
        training: TrainingDetails | None,
        seed: int,
        device: torch.device,
        batchnorm: str = "frozen",
        surrogate: Callable[[], Split] | None = None,
        statistics: Callable[[int], Statistics] | None = None,
        oracles: Mapping[str, Callable[[ServerView], Any]] | None = None,
        num_examples: Mapping[str, int | None] | None = None,
        clients: int = 1,
        known: tuple[Tensor, ...] = (),
        progress: Callable[[int, int, str], None] | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        has = THREAT_MODELS[threat_model]
        self.device = device
        self.clients = clients
        self.known = known
        self.batchnorm = batchnorm
        self.progress = progress or _unwatched
        self._threat_model = threat_model
        self._used: set[Capability] = set()
        self._oracles_used: set[str] = set()
        self._data, self._seed = data, seed
        self._num_examples = dict(num_examples or {}) if Capability.BASICS in has else {}
        self._training = training if Capability.DETAILS in has else None
        self._surrogate = surrogate if Capability.SURROGATE in has else None
        self._statistics = statistics if Capability.STATISTICS in has else None
        self._oracles = dict(oracles or {})
        self._history: Sequence[ServerView] = ()
        self._checkpoints = checkpoints or Checkpoints()
        self._asked_to_stop = threading.Event()

    def remember(self, views: SavedViews) -> None:
        """Let a manipulator know what came back in the rounds before."""
        self._history = Blanked(views)
        if Capability.BASICS in self.granted:
            self._num_examples = {f["label"]: f["num_examples"] for f in views.facts()}

    @property
    def history(self) -> Sequence[ServerView]:
        """The views of the rounds before, while a manipulator crafts; empty afterwards."""
        self.require(Capability.UPDATES)
        return self._history

    def told(self) -> dict[str, Any]:
        """Return what any attack holds from the start: the task that clients' models are built
        for, which every message to them carries, how many clients there are, a seed of its own,
        and the images it holds.
        """
        held = {"clients": self.clients, "known": self.known}
        return {"spec": self._data, "seed": self._seed, **held}

    @property
    def threat_model(self) -> str:
        """The letter of the scenario's threat model."""
        return self._threat_model

    @property
    def granted(self) -> frozenset[Capability]:
        """What the scenario's threat model grants."""
        return THREAT_MODELS[self._threat_model]

    @property
    def used(self) -> frozenset[Capability]:
        """What was asked for and granted, for the report."""
        return frozenset(self._used)

    @property
    def oracles_used(self) -> frozenset[str]:
        """Which oracle grants were used, for the report's badges."""
        return frozenset(self._oracles_used)

    def require(self, capability: Capability) -> None:
        """Record the use of a capability.

        Raises
        ------
        NotGranted
            If the threat model does not have it; the message names the least model that does.
        """
        if capability not in self.granted:
            least = least_model(frozenset({capability}))
            raise NotGranted(
                f"threat model {self.threat_model} ({NAMES[self.threat_model]}) does not grant "
                f"{capability.value!r}; the least model that does is {least}"
            )
        self._used.add(capability)

    # -- updates: the server's own model is the server's ---------------------------------------
    def model(self, view: ServerView) -> nn.Module:
        """Build the model that this view's senders received, with the arrays they were sent.

        It is in eval mode where clients freeze BatchNorm (the scenario's policy), else in train
        mode; ``model.spec`` is its :class:`~fedsim.data.DataSpec`.
        """
        self.require(Capability.UPDATES)
        dtype = next(t.dtype for t in view.sent.values() if t.is_floating_point())
        model = build_model(view.model, self._data).to(dtype)
        load_arrays(model, view.sent)
        return model.train(self.batchnorm != "frozen").to(self.device)

    # -- basics --------------------------------------------------------------------------------
    @property
    def basics(self) -> Basics:
        """Input shape, classes, public mean and standard deviation."""
        self.require(Capability.BASICS)
        return Basics(self._data)

    def num_examples(self, view: ServerView) -> int:
        """Return how many examples this update was computed on.

        Raises
        ------
        NotGranted
            If basics are not granted, or the protocol does not reveal the number.
        """
        self.require(Capability.BASICS)
        count = self._num_examples.get(view.label)
        if count is None:
            raise NotGranted(f"the protocol does not reveal how many examples {view.label} is of")
        return count

    def most_examples(self, view: ServerView) -> int | None:
        """Return :meth:`num_examples`, or None where the protocol does not reveal it."""
        try:
            return self.num_examples(view)
        except NotGranted:
            return None

    def about(self, num_examples: Mapping[str, int]) -> "Knowledge":
        """Return the same knowledge of views that the attack itself made, for an attack within it.

        ``num_examples`` says of how many examples each is, by label.  What is asked for there
        counts as used here.
        """
        made = copy.copy(self)
        made._num_examples = dict(num_examples)
        return made

    # -- details -------------------------------------------------------------------------------
    @property
    def training(self) -> TrainingDetails:
        """How honest clients train."""
        self.require(Capability.DETAILS)
        assert self._training is not None
        return self._training

    # -- surrogate -----------------------------------------------------------------------------
    @property
    def surrogate(self) -> Split:
        """Data like the clients' and disjoint from theirs."""
        self.require(Capability.SURROGATE)
        assert self._surrogate is not None
        return self._surrogate()

    # -- statistics ----------------------------------------------------------------------------
    def statistics(self, client: int) -> Statistics:
        """Return one client's class distribution."""
        self.require(Capability.STATISTICS)
        assert self._statistics is not None
        return self._statistics(client)

    # -- oracles -------------------------------------------------------------------------------
    @overload
    def oracle(self, name: Literal["labels"], view: ServerView) -> Tensor: ...
    @overload
    def oracle(self, name: Literal["batchnorm"], view: ServerView) -> LayerStatistics: ...
    def oracle(self, name: str, view: ServerView) -> Any:
        """Return what no threat model grants; only where the scenario names the oracle.

        ``"labels"``: ``[B]`` int64.  ``"batchnorm"``: for each BatchNorm layer, by name, the mean
        ``[C]`` and biased variance ``[C]`` of what the true batch puts into it, in the model sent.

        Raises
        ------
        NotGranted
            If the scenario does not say ``oracles = "<name>"``.
        """
        if name not in self._oracles:
            raise NotGranted(
                f"oracle {name!r} is not granted; a scenario grants it with oracles = {name!r}, "
                "and its report wears a badge"
            )
        self._oracles_used.add(name)
        return self._oracles[name](view)

    # -- being cut off -------------------------------------------------------------------------
    def kept(self, name: str) -> dict[str, Tensor]:
        """Return what an attempt of this very attack kept under a name before it was cut off.

        It was on these very views and knew the same, and what it had used counts as used.  Empty
        if there is nothing.

        Raises
        ------
        ValueError
            If no checkpoint can have this name.
        """
        found = self._checkpoints.get(name)
        if found is None:
            return {}
        self._used |= {Capability(capability) for capability in found.used}
        self._oracles_used |= found.oracles
        return plain(found.tensors)

    def keep(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, instead of what was kept there, until the attack is done.

        Parameters
        ----------
        name : str
            Up to 100 of a-z, 0-9, '.', '_' and '-', a letter or digit first.
        tensors : mapping of str to Tensor
            Copied to the CPU.

        Raises
        ------
        ValueError
            If no checkpoint can have this name.
        """
        used = frozenset(capability.value for capability in self._used)
        kept = Checkpoint(plain(tensors), used, frozenset(self._oracles_used))
        self._checkpoints.put(named(name), kept)

    def forget(self) -> None:
        """Drop whatever is kept."""
        self._checkpoints.clear()

    @property
    def stopping(self) -> bool:
        """Whether somebody asked for the best so far: an attack that looks hands it back."""
        return self._asked_to_stop.is_set()

    def stop(self) -> None:
        """Ask for the best so far."""
        self._asked_to_stop.set()

    # -- the attack's own randomness -----------------------------------------------------------
    def generator(self, *names: object) -> torch.Generator:
        """Return a CPU generator of the attack's own.

        Its seed is a hash: it leads to no other stream except by trying run seeds one by one,
        which is what anybody with the initial model can do too.
        """
        return torch.Generator().manual_seed(seeds.derive(self._seed, *names))
