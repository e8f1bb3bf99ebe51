"""Model inconsistency: one client gets a live model, all others a dead one; their sum is its own.

Pasquini, Francati, Ateniese, "Eluding Secure Aggregation in Federated Learning via Model
Inconsistency", CCS 2022, gradient suppression.

The others' model has a last hidden ReLU layer that is below zero for every input.  Its output is
zero and so is its derivative, and of all parameters one alone gets a gradient:

    dL/dW_L = (p - y) h^T = 0,   dL/dtheta = 0 for all before it,   dL/db_L = p - y.

A securely aggregated sum of ``n_t`` examples of the target among N is then ``n_t / N`` times the
target's own gradient, to the bit, but for the last bias.  After local training all others send
back the very weights they got: the sum moves by ``n_t / N`` times the target's update.

*How dead*: the layer's biases are lowered by ``depth``, a power of two, and nothing else differs
between the two models.  The target's biases are rounded so that they come back exactly when
``depth`` is added again: from whatever single client's model the server still holds the target's.
(The authors' demo zeroes the layer's weights; then nothing of it remains.)

*The mark* (ours): one unit of that layer is a constant 1 for the target, so that ``dL/dW_L`` of
its column is the target's own ``dL/db_L``, which the sum would not tell.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor, log2
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypeIs

from fedsim.attack import (
    Active,
    Attack,
    Manipulation,
    ModelToSend,
    Paper,
    Reconstruction,
    Setting,
    ToyCase,
)
from fedsim.errors import RunFailed
from fedsim.models import build_model, is_buffer, load_arrays, travelling
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.sparsification import probing
from strategies.attacks.handing_on import HandsOn, same_for_all
from strategies.attacks.labels.rule import classifier
from strategies.channels.secagg import SecAgg

Client = Annotated[int, Field(ge=0)]
# The unit that the mark takes.
MARKED = 0
# Noise must be this many times as far from waking a dead layer as the layer is deep.
MARGIN = 4.0


@register("attack", "model-inconsistency")
@dataclass(frozen=True, kw_only=True)
class ModelInconsistency(HandsOn, Manipulation):
    """Take one client's update out of a securely aggregated sum, and attack it with another attack.

    Threat model F, with a model for each client; more where ``then`` needs more.  Adds no
    parameter.  Without secure aggregation there is nothing to take apart: the target's upload
    comes alone.

    Parameters
    ----------
    then : str
        Expression of the attack on the target's update.  A manipulation is the target's payload:
        everybody gets its model, the others' dead.
    targets : list of int
        Whose update to take in rounds 1, 2, ..., and from the first again.
    depth : float
        By how much the others' biases are lowered.
    mark : bool
        Spend one unit on the target's last bias gradient; for attacks that read labels off it.

    How many of a sum's examples are the target's is taken from the batch size (FedSGD; a client
    that holds fewer looks as if its gradient were smaller), or read off the dead biases (FedAvg:
    they come back as ``n_t / N`` of a live one).

    Fails where the last hidden layer is not followed by a ReLU, with weight decay, and where
    clients compare the models that they got, or bind them to their masks.  Behind SecAgg+ the
    target's values are rounded as ever; FedAvg wants ``depth`` times a client's examples below
    ``clipping_range * max_weight``.
    """

    paper: ClassVar[Paper] = Paper(
        title="Eluding Secure Aggregation in Federated Learning via Model Inconsistency",
        authors="Dario Pasquini, Danilo Francati, Giuseppe Ateniese",
        venue="CCS",
        year=2022,
        published="the sum is the target's gradient, to the bit, for every parameter but the last "
        "bias (the authors' demo compares them), whatever the number of clients",
        measured="others' gradients exactly 0 but for the last bias; behind SecAgg+ with 2, 8 and "
        "32 clients the sum is the target's gradient to one rounding step (pytest -m 'slow or not "
        "slow' tests/strategies/sparsification/test_model_inconsistency.py).  Inverting Gradients "
        "on batches of 4, 8 clients: 23.1 dB on average (fedsim run "
        "scenarios/model_inconsistency.toml).  Robbing the Fed as payload, one of 32 clients: 8 of "
        "8 images, 51 to 64 dB (model_inconsistency_secagg.toml)",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.UPDATES, Capability.BASICS, Capability.DETAILS, Capability.MANIPULATION}
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "F",
            "attack": "model-inconsistency(then='linear-inversion', targets=[0, 1, 2])",
            "channel": "secagg(max_weight=1)",
            "data.dataset": "digits",
            "model.name": "mlp",
            "federation.clients": 4,
            "federation.rounds": 3,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        },
        # Three of twelve images; SecAgg+ rounds their gradients to steps of 3.8e-6.
        figure="leak.psnr.mean",
        low=60.0,
        high=110.0,
    )

    then: str = "linear-inversion"
    targets: list[Client] | tuple[Client, ...] = (0,)
    depth: Annotated[float, Field(gt=0)] = 64.0
    mark: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; take on what the inner attack needs."""
        if not self.targets:
            raise ValueError("targets= names nobody; write for instance targets=[0]")
        if self.depth != 2.0 ** round(torch.tensor(self.depth).log2().item()):
            raise ValueError(
                f"depth={self.depth:g} is no power of two, and would round; write 64.0"
            )
        super().__post_init__()

    def check_reader(self, inner: Attack) -> None:
        """Refuse a reader of which clients get models of their own, and one that asks an oracle."""
        if isinstance(inner, Active) and not same_for_all(inner):
            raise ValueError(
                "then= takes an attack of which all clients get the same model, and which leaves "
                f"it open who they are; {inner.name} is not one"
            )
        if inner.oracles:
            raise ValueError(
                f"{self.then} asks for the oracle {min(inner.oracles)!r}, which is of the whole "
                "sum; use another label rule"
            )

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse a model that cannot be suppressed, and what ``then`` refuses."""
        if self.mark and kind == "weights":
            raise ValueError(
                "the mark is a constant 1 for one gradient, and local training moves it; use "
                "mark=False, or federation.local = 'fedsgd(...)'"
            )
        head, layer = classifier(model)
        hidden = probing.last_hidden(model, head)
        if hidden is None or layer.bias is None:
            raise ValueError(
                "suppression wants a hidden layer, and a bias in it and in the last one; use "
                "mlp(hidden=[128]), convnet or resnet20"
            )
        model = copy.deepcopy(model)
        head, layer = classifier(model)
        live, dead = self._pair(travelling(model), hidden)
        load_arrays(model, {**live, f"{hidden}.bias": dead + (1 - 1 / MARGIN) * self.depth})
        self._refuse_live(model)
        load_arrays(model, live)
        if self.mark:
            marked_column(model, layer)
        elif not _sends(self.inner):
            layer.register_parameter("bias", None)  # to the inner attack it does not exist
        super().check(model, kind)

    def check_setting(self, setting: Setting) -> None:
        """Refuse absent targets, weight decay, and dead biases that SecAgg+ would clip."""
        if absent := sorted(target for target in self.targets if target >= setting.clients):
            raise ValueError(
                f"target {absent[0]} is none of the {setting.clients} clients, 0 and up"
            )
        if setting.training.weight_decay:
            raise ValueError(
                "weight decay moves weights that have no gradient; use "
                "federation.local = 'fedavg(weight_decay=0.0, ...)'"
            )
        channel = setting.channel
        if isinstance(channel, SecAgg) and setting.training.kind == "weights":
            most = setting.uploads[-1]
            widest = channel.clipping_range * channel.max_weight / most
            if self.depth >= widest:
                raise ValueError(
                    f"secagg clips weights above {widest:.3g} of a client with {most} "
                    f"examples, and the dead biases are {self.depth:g} deep; let depth be "
                    f"{2.0 ** floor(log2(widest / 2)):g}, or max_weight in the channel larger"
                )
        super().check_setting(replace(setting, cohort=1))

    def target(self, server_round: int) -> int:
        """Return whose update a round is to give."""
        return self.targets[(server_round - 1) % len(self.targets)]

    # -- what is sent ----------------------------------------------------------------------------
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Make the target's model, and the layer that kills it for all others.

        Raises
        ------
        RunFailed
            If the others' weights would move all the same.
        """
        made = ModelToSend(expression, arrays)
        if _sends(inner := self.inner):
            made = inner.craft(expression, arrays, knowledge)
        model = build_model(made.expression, knowledge.basics.data)
        model = model.to(next(iter(made.arrays.values())).dtype)
        hidden = probing.last_hidden(model, classifier(model)[0])
        try:
            if hidden is None:
                raise ValueError(f"{made.expression} has no hidden layer to suppress")
            live, dead = self._pair(made.arrays, hidden)
            name = f"{hidden}.bias"
            load_arrays(model, {**live, name: dead + (1 - 1 / MARGIN) * self.depth})
            self._refuse_live(model)
        except ValueError as error:
            raise RunFailed(f"model-inconsistency: {error}") from error
        return Inconsistent(made.expression, live, made.prefix, made.places, {name: dead})

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:
        """Give the target the live model, and all others the dead one."""
        if not isinstance(sent, Inconsistent) or client == self.target(server_round):
            return sent
        return replace(sent, arrays={**sent.arrays, **sent.dead})

    def _pair(self, arrays: dict[str, Tensor], hidden: str) -> tuple[dict[str, Tensor], Tensor]:
        """Return the target's arrays and the others' biases, exactly ``depth`` below its own."""
        live = dict(arrays)
        weight, bias = live[f"{hidden}.weight"], live[f"{hidden}.bias"]
        if float(bias.abs().max()) >= self.depth / 2:
            raise ValueError(
                f"biases of {hidden} reach {float(bias.abs().max()):.3g}: let depth be more than "
                "twice that"
            )
        if self.mark:
            weight, bias = weight.clone(), bias.clone()
            weight[MARKED], bias[MARKED] = 0.0, 1.0
        dead = bias - self.depth
        live |= {f"{hidden}.weight": weight, f"{hidden}.bias": dead + self.depth}
        return live, dead

    def _refuse_live(self, model: nn.Module) -> None:
        """Refuse a model of which noise moves more than the last bias, at a part of the depth."""
        head, _ = classifier(model)
        if moving := sorted(probing.moved(model) - {f"{head}.bias"}):
            raise ValueError(
                f"biases {self.depth / MARGIN:g} lower do not kill the last hidden layer: "
                f"{moving[0]!r} and {len(moving) - 1} more still have gradients; use a model with "
                "a ReLU before the last layer, or a larger depth"
            )

    # -- what is read ----------------------------------------------------------------------------
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Take the targets' updates out of the sums, and let the inner attack reconstruct them.

        Raises
        ------
        ValueError
            If no target sent anything.
        """
        made, places, counts, receipts = [], [], {}, []
        for index, view in enumerate(views):
            target = self.target(view.round)
            if target not in view.senders:
                continue
            own, examples = self.unmixed(view, target, knowledge)
            made.append(own)
            places.append(index)
            counts[own.label] = examples
            receipts.append(
                f"took client {target}'s update out of {view.label}: of {examples} of its "
                f"{knowledge.num_examples(view)} examples"
                + " at most"
                * (view.kind == "gradient" and len(view.senders) > 1)
            )
        if not made:
            raise ValueError(f"none of the targets {list(self.targets)} sent anything")
        found = self.inner.reconstruct(made, knowledge.about(counts))
        return replace(
            found,
            views=torch.tensor(places)[found.views],
            receipts=(*receipts, *found.receipts),
        )

    def unmixed(
        self, view: ServerView, target: int, knowledge: Knowledge
    ) -> tuple[ServerView, int]:
        """Return the target's own view, and of how many examples it is; values in float64.

        The last bias is in it only where it is the target's own.
        """
        model = knowledge.model(view)
        head, layer = classifier(model)
        name = f"{probing.last_hidden(model, head)}.bias"
        sent = dict(view.sent)
        if float(sent[name].max()) < -self.depth / 2:
            sent[name] = sent[name] + self.depth
        total = knowledge.num_examples(view)
        examples = self._examples(view, sent[name], name, total, knowledge)
        share = examples / total
        received = {
            key: value.double() / share if view.kind == "gradient" else value.double()
            for key, value in view.received.items()
            if not is_buffer(key)
        }
        if view.kind == "weights" and share < 1:
            for key, value in received.items():
                others = sent[key].double() - (self.depth if key == name else 0.0)
                received[key] = (value - (1 - share) * others) / share
        if len(view.senders) > 1:
            del received[f"{head}.bias"]
            if self.mark:
                load_arrays(model, sent)
                column = marked_column(model, layer)
                received[f"{head}.bias"] = received[f"{head}.weight"][:, column]
        return replace(
            view, senders=(target,), sent=sent, received=received, num_examples=None
        ), examples

    def _examples(
        self, view: ServerView, live: Tensor, name: str, total: int, knowledge: Knowledge
    ) -> int:
        """Return how many of a view's examples are the target's."""
        if len(view.senders) == 1:
            return total
        if view.kind == "gradient":
            return min(knowledge.training.batch_size, total)
        # Of n_t / N live and the rest ``depth`` lower; training moves a bias by far less.
        lowered = (live.double() - view.received[name].double()).median() / self.depth
        return max(1, min(total, round(total * (1 - float(lowered)))))


@dataclass(frozen=True)
class Inconsistent(ModelToSend):
    """The target's model, and the biases that all others get instead."""

    dead: dict[str, Tensor] = field(default_factory=dict)


def marked_column(model: nn.Module, layer: nn.Linear) -> int:
    """Return a feature that is exactly 1, whatever the image.

    Raises
    ------
    ValueError
        If there is none: a shortcut leads past the marked layer.
    """
    seen = probing.features(model, layer)
    constant = (seen == 1.0).all(dim=0).nonzero().flatten()
    if not len(constant):
        raise ValueError(
            "no unit of the last hidden layer can be marked (a shortcut leads past it); use "
            "mark=False, or a model without shortcuts"
        )
    return int(constant[0])


def _sends(attack: Attack) -> TypeIs[Manipulation]:
    return isinstance(attack, Manipulation)
