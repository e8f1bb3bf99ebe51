"""What every client-side defense is: hooks around local training that default to no change.

The hooks follow the order in which a client works; a chain ``a | b`` applies a's hook, then b's.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from fedsim.accounting import Releases
from fedsim.attack import Paper, Setting, ToyCase
from fedsim.data import DataSpec

Place = Literal["gradient", "update"]
#: The error code of a client that refused what the server sent or asked; Flower's own end at 8.
REFUSED = 1001
Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class Rank(IntEnum):
    """A defense's place in the one order of a chain that keeps every guarantee."""

    CHECK = 0
    DATA = 10
    MODEL = 20
    GRADIENT = 30
    CLIP = 40
    NOISE = 50
    SPARSIFY = 60
    QUANTIZE = 70
    SERVER = 80


#: Why a defense must not stand behind one of a higher rank.
BELONGS_BEFORE = {
    Rank.CHECK: "checks look at what was received before the rest acts",
    Rank.DATA: "what changes examples acts before there is a gradient of them",
    Rank.MODEL: "what changes the model acts before there is a gradient of it",
    Rank.GRADIENT: "it makes the gradient, and would throw away what was done to it",
    Rank.CLIP: "a norm cut off after noise, or after rounding, bounds no sensitivity, and biases",
    Rank.NOISE: "noise after sparsifying or rounding fills the zeros and leaves the grid again",
    Rank.SPARSIFY: "sparsifying picks by magnitude, which rounding has made equal",
    Rank.QUANTIZE: "what is rounded last is what is sent",
}


@dataclass(frozen=True)
class TrainingPlan:
    """What a local rule will do with ``examples`` examples in a run of ``rounds`` rounds.

    ``steps`` is the number of optimizer steps a round, ``sample_rate`` the share of the client's
    examples in one step, ``tensors`` how many arrays are trained, for who clips each by itself.
    """

    kind: Literal["gradient", "weights"]
    lr: float
    batch_size: int
    examples: int
    steps: int
    rounds: int
    tensors: int = 1

    @property
    def sample_rate(self) -> float:
        """Share of the client's examples in one step."""
        return min(1.0, self.batch_size / max(self.examples, 1))


@dataclass
class Effect:
    """Sums over all calls of one defense in one round at one client.

    ``figures`` are what else it tells the auditor of itself, by name: the report shows their mean.
    ``releases`` are what a formal defense released in this run so far, for the auditor's sums.
    """

    changed: bool = False
    dot: float = 0.0
    before: float = 0.0
    after: float = 0.0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    releases: Releases = ()

    def receipt(self) -> dict[str, Any]:
        """Return ``changed``, the cosine to the unchanged update, the norm ratio and seconds."""
        norms = (self.before * self.after) ** 0.5
        return {
            "changed": self.changed,
            "cosine": self.dot / norms if norms else None,
            "norm_ratio": (self.after / self.before) ** 0.5 if self.before else None,
            "seconds": self.seconds,
            **({"releases": [astuple(r) for r in self.releases]} if self.releases else {}),
            **self.figures,
        }


@dataclass
class ClientContext:
    """What a defense may know: its own client's side, never the server's.

    Attributes
    ----------
    client, round : int
    plan : TrainingPlan
    public : callable
        ``public(*names) -> torch.Generator`` of the repeatable public stream.
    secret : callable
        ``secret(*names) -> torch.Generator`` of the secret stream: noise, masks, keys.
    store : dict of str to Tensor
        This client's persistent state: survives between rounds and a restart of its SuperNode.
    effects : dict of str to Effect
        What each defense did, by name, for the auditor; it stays on the client's side.
    step : int
        Local optimizer step, from 0.
    model : str
        The expression of the model that the server sent.
    run_id : int
        The run that this client takes part in.
    spec : DataSpec or None
        Shape, classes, mean and standard deviation of the data, as the server told them.
    labels : Tensor or None
        ``[N]`` int64, of all of the client's own examples, for samplers that choose by class.
    bounds : dict of str to dict of str to float or None
        By defense, what the L2 norm of what enters ``transform_gradient`` and ``transform_update``
        cannot exceed.
    places : dict of str to tuple of int
        Which arrays it was told to place in a larger one, and where (:mod:`fedsim.placing`).
    shared : frozenset of str or None
        Names of the parameters that the server sent; others, which :meth:`Defense.wrap_model`
        added, are trained and stay here.  None where all are shared.
    trainee : nn.Module or None
        The model as it is in this step, for ``transform_gradient``.
    batch : tuple of Tensor or None
        What this step's gradient is of, for ``transform_gradient``.
    """

    client: int
    round: int
    plan: TrainingPlan
    public: Callable[..., torch.Generator]
    secret: Callable[..., torch.Generator]
    store: Tensors = field(default_factory=dict)
    effects: dict[str, Effect] = field(default_factory=dict)
    step: int = 0
    model: str = ""
    run_id: int = 0
    spec: DataSpec | None = None
    labels: Tensor | None = None
    bounds: dict[str, dict[Place, float | None]] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: frozenset[str] | None = None
    trainee: nn.Module | None = None
    batch: Batch | None = None

    def public_part(self, update: Tensors) -> Tensors:
        """Return what of an update is of parameters that the server knows of."""
        shared = self.shared
        if shared is None or update.keys() <= shared:
            return update
        return {name: tensor for name, tensor in update.items() if name in shared}

    def effect(self, defense: "Defense") -> Effect:
        """Return the sums in which this defense's doings are counted."""
        return self.effects.setdefault(defense.name, Effect())


class Refusal(Exception):  # noqa: N818 - a client's answer, not its error
    """A client will not train on what it was sent, or send what came of it."""


@dataclass(frozen=True)
class ServerContext:
    """What the server's part of a defense may know.

    ``secret(*names)`` is a generator of the secret stream, the server's own.  ``cohort`` clients
    train in each of ``rounds`` rounds.  ``figures`` are what each defense tells of what it did
    here, by its name; one that leaves none did nothing, and fails the run.
    """

    cohort: int
    rounds: int
    secret: Callable[..., torch.Generator]
    figures: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a client thinks of a model it received, or of the update that came of it.

    ``checks`` are scores by name.  ``reason`` says why it refuses, or what it could not decide: a
    refusal's goes to the server, the other to the auditor alone.
    """

    accept: bool
    checks: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Privacy:
    """A formal guarantee: epsilon at delta, and what it is about."""

    epsilon: float
    delta: float
    unit: str
    relation: str
    mechanism: str


class Defense:
    """Every hook defaults to "change nothing"."""

    name: ClassVar[str]
    paper: ClassVar[Paper]
    toy: ClassVar[ToyCase]
    #: Expressions of it at three strengths, the weakest first, with the clip that it needs, if any.
    strengths: ClassVar[tuple[str, ...]] = ()
    #: The strongest attack on it that was found, at the middle of the strengths: one that knows of
    #: it, where there is one.
    adversary: ClassVar[str] = ""
    #: Scenario keys that this attack wants otherwise than usual, by their dotted names: a round is
    #: not enough for it, or one client, or the model is not what it reads.
    adversary_setting: ClassVar[Mapping[str, str | int | float | bool]] = {}
    #: Whether this defense must change uploads; a detector or a data defense need not.
    changes_upload: ClassVar[bool] = True
    #: Whether it says by itself (``Effect.changed``) when the network that it had everybody train
    #: comes to anything; that of others always does.
    tells_of_network: ClassVar[bool] = False
    #: Whether its guarantee is of a sum over clients: there is none where uploads are read singly,
    #: or where another defense changes them before they are added.
    of_sums: ClassVar[bool] = False
    #: Whether its guarantee counts on a trained model that is as it was received: there is none
    #: where parameters are added that stay at home, for those are of private data.
    reads_model: ClassVar[bool] = False
    #: Its place in a chain.
    rank: ClassVar[Rank] = Rank.CHECK
    #: Whether its ``transform_gradient`` keeps nothing of what others made of the gradient: none
    #: may have done so before it.
    replaces_gradient: ClassVar[bool] = False
    #: Why nothing after it may change its uploads, at the client or the server; "" where all may.
    seals: ClassVar[str] = ""

    @property
    def noises(self) -> Place | None:
        """Where it adds noise; who makes the gradient itself (``gradients``) is not asked."""
        return None

    @property
    def clips(self) -> Place | None:
        """Where it cuts off the norm of what others made."""
        return None

    @property
    def in_each_sum(self) -> int:
        """How many of the federation's own clients a sum must hold for the guarantee to be true."""
        return 0

    @property
    def refuses_on_examples(self) -> bool:
        """Whether it may refuse a round for what the client's examples are; the server sees it."""
        return False

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a model or an upload kind that this defense cannot act on (``ValueError``)."""

    def fitting(self, model: str, network: nn.Module) -> str:
        """Return the expression of a model like ``model`` that :meth:`check` lets pass.

        ``network`` is that model; most defenses take any.  For ``fedsim fix``.
        """
        return model

    def check_setting(self, setting: Setting) -> None:
        """Refuse a federation in which this defense cannot act as it says (``ValueError``)."""

    def architecture(self, model: str) -> str:
        """Return the model expression that server and clients share instead of ``model``.

        For defenses that are part of the network, and known to all.
        """
        return model

    def strategy(self, inner: Strategy, ctx: ServerContext) -> Strategy:
        """Return a Flower strategy around ``inner``, for what the server itself does.

        It gets full weights of each client and hands them on (:class:`fedsim.federation.Wrapper`).
        """
        return inner

    def weight(self, plan: TrainingPlan) -> int | None:
        """Return how many examples the client says that its update is of; None for the truth."""
        return None

    def shared(self) -> list[Path]:
        """Return the folders in which clients tell each other what the server must not touch.

        A run's clients write to ``<folder>/<run id>``.  The folders are closed to attack code, and
        what a run left there goes when it ends.
        """
        return []

    def inspect(
        self, model: nn.Module, received: Tensors, probe: Batch, ctx: ClientContext
    ) -> Verdict:
        """Accept or refuse the model that was received, before training on it.

        Parameters
        ----------
        model : nn.Module
            A copy, in the mode in which it would be trained.
        received : dict of str to Tensor
            Its parameters and buffers, as received.
        probe : tuple of Tensor
            The client's first batch of this round, images ``[B, C, H, W]`` and labels ``[B]``: its
            gradient is what the client would upload (FedSGD) or do first (FedAvg).
        ctx : ClientContext
        """
        return Verdict(accept=True)

    def inspect_update(
        self, received: Tensors, update: Tensors, used: Batch, ctx: ClientContext
    ) -> Verdict:
        """Accept or refuse to send an update, after training and everything else.

        Parameters
        ----------
        received : dict of str to Tensor
            The model's parameters and buffers, as received.
        update : dict of str to Tensor
            What would be sent, as who reads it would: the gradient (FedSGD), or what would be sent
            minus ``received``, in float64 (FedAvg).
        used : tuple of Tensor
            All examples that it was computed on, as the client holds them: images ``[N, C, H, W]``
            and labels ``[N]``.
        ctx : ClientContext
        """
        return Verdict(accept=True)

    def sampler(
        self, batches: Iterable[Tensor], examples: int, ctx: ClientContext
    ) -> Iterable[Tensor]:
        """Return the index tensors of this round's batches."""
        return batches

    def transform_batch(self, batch: Batch, ctx: ClientContext) -> Batch:
        """Change images ``[B, C, H, W]`` and labels (``[B]`` int64 or ``[B, K]`` soft)."""
        return batch

    def wrap_model(self, model: nn.Module, ctx: ClientContext) -> nn.Module:
        """Return the module to train, a copy that may be changed in place.

        What the server sent keeps its names.  Parameters of other names are private: trained, and
        never uploaded; a tensor of ``ctx.store`` that shares their memory remembers them.
        """
        return model

    def loss(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensor | None:
        """Return the training loss, or None for mean cross-entropy."""
        return None

    def gradients(self, model: nn.Module, batch: Batch, ctx: ClientContext) -> Tensors | None:
        """Return the batch gradient by a way of one's own (per example, say), or None."""
        return None

    def transform_gradient(self, gradient: Tensors, ctx: ClientContext) -> Tensors:
        """Change one step's gradient, before the client itself trains on it.

        It is of ``ctx.trainee`` on ``ctx.batch``.
        """
        return gradient

    def learning_rate(self, lr: float, ctx: ClientContext) -> float:
        """Return this step's learning rate."""
        return lr

    def transform_update(self, update: Tensors, ctx: ClientContext) -> Tensors:
        """Change what is uploaded only: the gradient (FedSGD), or ``after - before`` (FedAvg)."""
        return update

    def norm_bound(self, at: Place, entering: float | None) -> float | None:
        """Return what the L2 norm of what leaves ``transform_<at>`` cannot exceed.

        ``entering`` bounds what enters it; None is no bound.  A defense that has the hook and does
        not say otherwise voids the bound.
        """
        hook = "transform_" + at
        return entering if getattr(type(self), hook) is getattr(Defense, hook) else None

    def privacy(self, plan: TrainingPlan, entering: Mapping[Place, float | None]) -> Privacy | None:
        """Return the formal guarantee for a whole run, where there is one.

        ``entering`` bounds the L2 norm of what enters each hook of this defense.
        """
        return None


def guarantees(
    defenses: Sequence[Defense], plan: TrainingPlan, *, sums: bool = False
) -> dict[str, Privacy]:
    """Return the formal guarantees of a chain, by defense; each covers all that is uploaded.

    ``sums`` says whether the channel lets the server read nothing but sums over clients.  What a
    sum promises ends where a later defense changes each upload before it is added: that is no
    post-processing of the sum.  There is none where a client refuses rounds for what its examples
    are: that answer is in no ledger.
    """
    if any(defense.refuses_on_examples for defense in defenses):
        return {}
    entering = norm_bounds(defenses, plan)
    by_name = {defense.name: defense for defense in defenses}
    found = {
        d.name: d.privacy(plan, entering[d.name])
        for place, d in enumerate(defenses)
        if not d.of_sums or (sums and not any(map(changes_uploads, defenses[place + 1 :])))
    }
    return {
        name: privacy
        for name, privacy in found.items()
        if privacy is not None
        and not (privacy.unit == "example" and _mixes(defenses, name))
        and not (by_name[name].reads_model and _others_wrap(defenses, name))
    }


def has(defense: Defense, hook: str) -> bool:
    """Say whether a defense has a hook of its own."""
    return getattr(type(defense), hook) is not getattr(Defense, hook)


def changes_uploads(defense: Defense) -> bool:
    """Say whether a defense acts on what is uploaded, at the client."""
    return has(defense, "transform_update")


def norm_bounds(
    defenses: Sequence[Defense], plan: TrainingPlan
) -> dict[str, dict[Place, float | None]]:
    """Return what the L2 norm of what enters each defense's hooks cannot exceed; None is no bound.

    A norm bound (clipping) holds until a later defense voids it.  FedSGD uploads the gradient it
    trains on, so that the bound goes on from one hook to the other; FedAvg's update is many steps.
    """
    entering: dict[str, dict[Place, float | None]] = {d.name: {} for d in defenses}
    bound: float | None = None
    places: tuple[Place, ...] = ("gradient", "update")
    for place in places:
        if plan.kind == "weights":
            bound = None
        for defense in defenses:
            entering[defense.name][place] = bound
            bound = defense.norm_bound(place, bound)
    return entering


def _mixes(defenses: Sequence[Defense], name: str) -> bool:
    """Say whether a defense other than ``name`` touches examples, or makes the gradient of them.

    One example's gradient is then not of one example only, or not the one that is clipped.  Nor is
    it counted right where parameters are added that stay at home: they are of the examples too.
    """
    others = [defense for defense in defenses if defense.name != name]
    touched = any(d.rank in (Rank.DATA, Rank.GRADIENT) for d in others)
    return touched or _others_wrap(defenses, name)


def _others_wrap(defenses: Sequence[Defense], name: str) -> bool:
    """Say whether a defense other than ``name`` may add parameters that stay at home."""
    return any(type(d).wrap_model is not Defense.wrap_model for d in defenses if d.name != name)
