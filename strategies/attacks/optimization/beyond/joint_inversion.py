"""Joint inversion: search the part of the network that a client keeps to itself with the image.

Some defenses give each client parameters s that it never uploads: a branch beside the classifier
(``spn``), a lock behind the first convolution (``fedkl``), the inputs' factors of fully connected
layers (``pefl(private=True)``).  The loss ``L(x, y; w, s)`` is then of another network than the one
that the server knows, and no image explains the gradient in that one.  But the defense's design is
public; only s is secret.  So the attacker builds the client's network with a guess of s, and
searches

    min_{x, s} 1 - cos(dL/dw(x, y; w, s), g) + tv * TV(x)

over what was uploaded, w.  L is the client's own loss, with what the defense adds to it.  Signed
Adam on x, plain Adam on s.  It is Dropout Inversion (Scheliga et al., AAAI 2023) with parameters in
the place of masks, and how the SoK (Carletti et al., USENIX Security 2025) says that such defenses
fall: the private part is simulated.

s is one for all examples of a batch: unknowns do not grow with it, as masks do.  Buffers of the
private part (``fedkl``'s key) are guessed once and not searched.

What to write as ``defense``: any expression whose private part can be what the client's is.  The
lock of ``fedkl`` comes to one scale and one shift for each channel, whatever the key's length, and
a ReLU that is closed has no slope to open it by: ``fedkl(key_length=1, activation='sigmoid')`` has
the same scales and shifts, all in reach.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedsim import registry
from fedsim.attack import Paper, Reconstruction, ToyCase
from fedsim.data import DataSpec
from fedsim.defense import ClientContext, Defense, TrainingPlan
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.attack import TakesLabels
from strategies.attacks.optimization.convolutions import is_narrow
from strategies.attacks.optimization.engine import Recipe, invert
from strategies.attacks.optimization.gradients import Operator, freeze
from strategies.attacks.optimization.objectives import Cosine
from strategies.attacks.optimization.optimizers import Adam
from strategies.attacks.optimization.parametrizations import Candidate, NormalizedPixels, Signed
from strategies.attacks.optimization.priors import TotalVariation
from strategies.attacks.optimization.schedules import cosine


@register("attack", "joint-inversion")
@dataclass(frozen=True, kw_only=True)
class JointInversion(TakesLabels):
    """Threat model C: the defense's design is known, what it draws is not.

    Cost: ``iterations * restarts`` gradient evaluations for each view.

    Parameters
    ----------
    defense : str
        The defense that keeps parameters private, as the attacker takes it to be.
    iterations : int
        Of each restart.
    restarts : int
        Each from another guess; the one with the lowest cosine distance wins.
    tv : float
        Weight of the total variation.
    lr : float
        Adam's rate at the start, in standardized pixels.
    rate : float
        What a step moves private parameters by, as a share of what it moves pixels by.
    labels : str
        Label rule expression.
    """

    paper = Paper(
        title="SoK: Gradient Inversion Attacks in Federated Learning",
        authors="Vincenzo Carletti, Pasquale Foggia, Carlo Mazzocca, Giuseppe Parrella, "
        "Mario Vento",
        venue="USENIX Security",
        year=2025,
        published="no figure was read; its table says that private branches and locks fall to who "
        "simulates them",
        measured="digits, convnet(width=8), 4 images one by one, 1000 iterations, tv 1e-5, "
        "inverting-gradients / joint inversion: spn 6.8 / 54.9 dB, pefl(private=True) 7.4 / 46.0, "
        "fedkl 7.4 / 28.1 (fedsim run scenarios/joint_inversion.toml, with defenses and attack of "
        "docs/methods/joint-inversion.md)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS, Capability.DETAILS})
    unit = "iterations"
    toy = ToyCase(
        scenario={
            "threat-model": "C",
            "attack": "joint-inversion(defense='spn', iterations=300, tv=1e-3)",
            "defenses": "spn",
            "data.dataset": "digits",
            "model.name": "convnet(width=8)",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        figure="leak.psnr.mean",
        # Branches are of the machine's secret key: of eight keys, 25 to 41 dB.
        low=18.0,
        high=60.0,
    )

    defense: str
    iterations: Annotated[int, Field(ge=1)] = 1000
    restarts: Annotated[int, Field(ge=1)] = 4
    tv: Annotated[float, Field(ge=0)] = 1e-5
    lr: Annotated[float, Field(gt=0)] = 0.1
    rate: Annotated[float, Field(gt=0)] = 0.1
    labels: str = "analytic"

    def __post_init__(self) -> None:
        """Refuse a label rule or a defense that does not exist (``ScenarioError``)."""
        super().__post_init__()
        _ = self.known

    @property
    def known(self) -> Defense:
        """The defense, with secrets of nobody's."""
        known: Defense = registry.build("defense", self.defense, "attack: defense")
        return known

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a defense without private parameters, or without room for them in this model."""
        super().check(model, kind)
        if not Guess.of(model, self.known, torch.Generator()).private:
            raise ValueError(
                f"{self.defense} keeps no parameter of this model private, so there is nothing to "
                "search beside the image; use inverting-gradients, or name spn, fedkl, "
                "pefl(private=True)"
            )

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return as many images for each view as it has examples."""
        knowledge.require(Capability.DETAILS)
        defense = self.known
        recipe = Recipe(
            batch_size=knowledge.num_examples,
            labels=self.rule,
            parametrization=lambda group: PixelsAndParameters(
                group.spec,
                group.known_labels,
                group.observed.dtype,
                lambda generator: Guess.of(group.model, defense, generator).flat,
                self.rate,
            ),
            operator=lambda group, _: JointGradients(
                Guess.of(group.model, defense, knowledge.generator("private part")), group.names
            ),
            objective=lambda group: Cosine(group.observed),
            priors=lambda group: [TotalVariation(self.tv, group.spec.std)] if self.tv else [],
            optimizer=lambda _: Adam(self.lr, signed=False, schedule=cosine()),
            iterations=self.iterations,
            restarts=self.restarts,
        )
        return invert(views, knowledge, recipe)


@dataclass(frozen=True)
class Guess:
    """A client's network as the attacker imagines it.

    Attributes
    ----------
    model : nn.Module
        A copy of what the server sent, with a private part of the attacker's own.
    private : tuple of str
        Names of the parameters that the server never saw.
    defense : Defense
        What put it there.
    ctx : ClientContext
        Of the client that is imagined.
    """

    model: nn.Module
    private: tuple[str, ...]
    defense: Defense
    ctx: ClientContext

    @classmethod
    def of(cls, model: nn.Module, defense: Defense, generator: torch.Generator) -> Self:
        """Let the defense wrap a copy of the model, its secrets drawn from ``generator``."""
        one_step = TrainingPlan("gradient", 1.0, 1, 1, 1, 1)
        stream = lambda *_: generator  # noqa: E731 - both streams of a client that is nobody
        ctx = ClientContext(client=0, round=1, plan=one_step, public=stream, secret=stream)
        wrapped = defense.wrap_model(copy.deepcopy(model), ctx)
        shared = {name for name, _ in model.named_parameters()}
        private = [name for name, _ in wrapped.named_parameters() if name not in shared]
        return cls(wrapped, tuple(private), defense, ctx)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the client's loss of images ``[B, C, H, W]`` and labels ``[B]``."""
        own = self.defense.loss(self.model, (images, labels), self.ctx)
        return cross_entropy(self.model(images), labels) if own is None else own

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The private parameters as they were guessed."""
        return {name: self.model.get_parameter(name).detach() for name in self.private}

    @property
    def flat(self) -> Tensor:
        """The private parameters one after the other, ``[m]``, on the CPU."""
        return torch.cat([each.flatten().cpu() for each in self.parameters.values()])


class PixelsAndParameters(NormalizedPixels):
    """Standardized pixels, of whose slope the search sees the sign, and beside them parameters.

    The variables of parameters are their values over ``rate``, so that one step of Adam moves them
    by that share of what it moves pixels.

    Parameters
    ----------
    spec : DataSpec
    labels : Tensor
        ``[T, B]`` int64.
    dtype : torch.dtype
    guess : callable
        Draws where a restart's parameters begin, ``[m]``.
    rate : float
    """

    def __init__(
        self,
        spec: DataSpec,
        labels: Tensor,
        dtype: torch.dtype,
        guess: Callable[[torch.Generator], Tensor],
        rate: float,
    ) -> None:
        super().__init__(spec, labels, dtype, boxed=True)
        self.guess, self.rate = guess, rate
        self.pixels = labels.shape[1] * prod(spec.shape)

    def start(self, generator: torch.Generator) -> Tensor:
        """Return standard normal pixels and the parameters of another guess."""
        return torch.cat([super().start(generator), self.guess(generator) / self.rate])

    def decode(self, variables: Tensor) -> Candidate:
        """Return images, labels and parameters."""
        images, labels, _ = super().decode(variables[:, : self.pixels])
        return Candidate(Signed.apply(images), labels, variables[:, self.pixels :] * self.rate)

    def box(self, variables: Tensor) -> None:
        """Bring pixels back into ``[0, 1]``; parameters are free."""
        super().box(variables[:, : self.pixels])

    def take(self, rows: Tensor) -> Self:
        """Return the parametrization of some of the targets."""
        own = self.labels[rows], self.mean.dtype
        return type(self)(self.spec, *own, self.guess, self.rate)


class JointGradients(Operator):
    """Gradients of the client's loss by what is shared, at the candidates' private parameters.

    Parameters
    ----------
    guess : Guess
        Owned from here on; its own private parameters are not used.
    names : sequence of str
        Parameters to differentiate.
    """

    def __init__(self, guess: Guess, names: Sequence[str]) -> None:
        freeze(guess.model, names)
        self.narrow = is_narrow(guess.model)
        self._model = Lossy(guess)
        everything = dict(guess.model.named_parameters())
        self._shared = {name: everything[name].detach() for name in names}
        self._private = {name: tensor.shape for name, tensor in guess.parameters.items()}
        self._each = vmap(grad(self._loss), in_dims=(None, 0, 0, 0), randomness="different")

    def __call__(self, candidate: Candidate) -> tuple[list[Tensor], list[Tensor]]:
        """Return one gradient for each name; nothing is read on the way."""
        images, labels, beside = candidate
        assert beside is not None
        pieces = torch.split(beside, [shape.numel() for shape in self._private.values()], dim=1)
        private = {
            name: piece.reshape(-1, *shape)
            for (name, shape), piece in zip(self._private.items(), pieces, strict=True)
        }
        return list(self._each(self._shared, images, labels, private).values()), []

    def _loss(
        self, shared: dict[str, Tensor], images: Tensor, labels: Tensor, private: dict[str, Tensor]
    ) -> Tensor:
        put = {f"network.{name}": tensor for name, tensor in {**shared, **private}.items()}
        loss: Tensor = functional_call(self._model, put, (images, labels))
        return loss


class Lossy(nn.Module):
    """A guess as a module from images and labels to the loss, for parameters to be put into."""

    def __init__(self, guess: Guess) -> None:
        super().__init__()
        self.network, self.loss = guess.model, guess.loss

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the client's loss."""
        return self.loss(images, labels)
