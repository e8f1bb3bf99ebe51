"""Fishing: a rewritten last layer lets one image of a batch answer, and silences all others.

Wen, Geiping, Fowl, Goldblum, Goldstein, "Fishing for User Data in Large-Batch Federated Learning
via Gradient Magnification", ICML 2022.

Only the head changes, logits ``z = W f(x) + b`` of features ``f`` ``[D]`` and K classes.  Image j
moves the backbone by ``sum_k W_k (p_k - y_k)``, so a head that gives it ``p = y`` silences it.

*Roll call* (ours; the authors' code takes labels from the user's metadata): ``W = 0, b = 0``.  No
image moves the backbone, and every class is counted: ``n_k = B (1/K - db_k)`` exactly.

*Class fishing*, target c: ``W_c = alpha 1``, other rows 0, ``b_k = 1000`` for ``k != c``.  Then
``p_c = 0`` for all: images of other classes are silent, images of c all have the weight alpha.
(The authors leave ``b_c`` what it was; here it is 0.)

*Feature fishing*, in a batch of one class c, feature i: ``W = 0`` but ``W_ci = beta``,
``b_c = ln(K-1) - beta theta``, ``b_k = 0``.  Then ``p_c = sigma(beta (f_i - theta))``: images above
the threshold are silent, images below have the weight beta.  Of batches with several classes it
isolates nothing (images of *other* classes above theta would answer), and is not tried there.

Whichever it was, with ``w_j = 1 - p_c`` of image j of class c the head's own row says who answered:

    -B db_c = sum_j w_j,   -B dW_c = sum_j w_j f(x_j),   and for the backbone
    -B dL/dtheta = beta sum_j w_j df_i(x_j)/dtheta   (or alpha times all features' sum)

Differences between two thresholds are sums over the images between them: their number, their mean
feature (the next threshold, which always splits them), and, once the number is 1, the gradient of
one image.  Rule: ``beta gap >> 5``, gap the distance to the neighbors in ``f_i``.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.attack import (
    Attack,
    Manipulation,
    ModelToSend,
    Paper,
    Reconstruction,
    Setting,
    ToyCase,
)
from fedsim.errors import ScenarioError
from fedsim.models import build_model, is_buffer, travelling
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.sparsification.fishing_heads import (
    Answer,
    Catch,
    Head,
    holds_one,
    holds_together,
    isolated,
    marks,
    next_threshold,
)
from strategies.attacks.analytic.sparsification.probing import features
from strategies.attacks.handing_on import HandsOn
from strategies.attacks.labels.rule import classifier

# What exp() makes nothing of: a logit so much below another has probability 0 in float32.
SILENT = 100.0
# Images may move the features so many times as far as noise does.
CAUTION = 2.0


@register("attack", "fishing")
@dataclass(frozen=True, kw_only=True)
class Fishing(HandsOn, Manipulation):
    """Isolate single images' gradients, and hand them to a passive attack as batches of one.

    Threat model F.  The architecture stays; no parameter is added.  One query (``target``), two
    (class fishing after a roll call) or about ``log2(B) + 2`` (feature fishing) for the first
    image; every further round isolates more.  What needs several rounds needs the *same* batch in
    each: clients that hold no more than one batch.  All rounds send the first round's backbone, so
    that they add up; the federation's own learning suffers.

    Behind secure aggregation the sum is one large batch, and the same holds of it.

    Parameters
    ----------
    then : str
        Expression of the passive attack that gets the isolated gradients.
    by : {"class", "feature"}
        ``"class"``: for batches of several classes, gives the images of one of them.
        ``"feature"``: for batches of one class, gives single images.
    target : int or None
        With ``by="class"``: fish this class, every round, without a roll call.  None: round 1
        counts labels, the rounds after it fish each client's classes of at most ``most`` images.
    most : int
        With ``by="class"``: hand over gradients of at most so many images.
    alpha : float
        The class row's weight (the paper's 0.5).
    beta : float
        The feature's weight.  The authors' 300 is too little for batches of dozens; beyond 1e6
        float32's rounding of the feature decides.
    bias : float
        What other classes' biases are set to in class fishing.

    Fails where another image shares the class (class fishing) or the feature's very value, where
    BatchNorm in train mode lets silenced images influence others, and where batches change from
    round to round (feature fishing; the receipts say so).
    """

    paper: ClassVar[Paper] = Paper(
        title="Fishing for User Data in Large-Batch Federated Learning via Gradient Magnification",
        authors="Wen, Geiping, Fowl, Goldblum, Goldstein",
        venue="ICML",
        year=2022,
        published="the authors' notebooks, ImageNet, ResNet-18, registered PSNR of the best of the "
        "batch: 256 random images, class fishing, 20.2 dB; 50 images of one class, 7 queries, "
        "18.3 dB (ViT: 20.8); across devices, 16 of one class, 19.2",
        measured="CIFAR-10, batches of 64: class fishing's gradient has cosine 1.00000000 to the "
        "class's own; of one class, 11 images alone in 16 rounds, the first in round 4 "
        "(FEDSIM_TEST_DATA=... pytest -s tests/strategies/sparsification/test_fishing_on_cifar.py)."
        "  Photo tiles, four batches of 32, 4 rounds, untrained convnet(stride=2), 500 iterations: "
        "5 images, 24.5 to 40.8 dB (fedsim run scenarios/fishing.toml).  Patches of one class, "
        "linear inversion, 12 rounds: 26 of 160 at 115 dB or more (fishing_features.toml)",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.UPDATES, Capability.BASICS, Capability.MANIPULATION}
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "F",
            "attack": "fishing(then='linear-inversion')",
            "data.dataset": "digits",
            "data.partition": "size(partition_sizes=[16, 16, 16, 16])",
            "model.name": "mlp",
            "federation.clients": 4,
            "federation.rounds": 4,
            "federation.local": "fedsgd(batch_size=16, lr=0.1)",
        },
        # Three classes of one image each a client, where it has so many.
        figure="leak.exact",
        low=7.0,
        high=12.0,
    )

    then: str = "inverting-gradients"
    by: Literal["class", "feature"] = "class"
    target: Annotated[int, Field(ge=0)] | None = None
    most: Annotated[int, Field(ge=1)] = 1
    alpha: Annotated[float, Field(gt=0)] = 0.5
    beta: Annotated[float, Field(gt=0)] = 1e6
    bias: Annotated[float, Field(gt=0)] = 1000.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; take on what the inner attack needs."""
        if self.by == "feature" and (self.target is not None or self.most != 1):
            raise ValueError(
                "target= and most= are class fishing's; feature fishing reads the one class off "
                "the roll call, and isolates single images"
            )
        super().__post_init__()

    def check_reader(self, inner: Attack) -> None:
        """Refuse an active reader, one that joins rounds, and one that asks for an oracle."""
        super().check_reader(inner)
        if inner.joins_rounds:
            raise ValueError(
                f"{self.then} takes a client's uploads to be of the same images, and what is "
                "isolated is of others every round; use an attack on single uploads"
            )
        if inner.oracles:
            raise ValueError(
                f"{self.then} asks for the oracle {min(inner.oracles)!r}, which is of whole "
                "batches; here the label is known: leave it out"
            )

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse uploaded weights, a head that cannot be rewritten, and what ``then`` refuses."""
        if kind == "weights":
            raise ValueError(
                "fishing reads the gradient of one batch, and local training moves the head "
                "between batches; use federation.local = 'fedsgd(...)'"
            )
        name, layer = classifier(model)
        if layer.bias is None:
            raise ValueError(f"the last layer {name!r} has no bias; use a model with one")
        if self.target is not None and self.target >= layer.out_features:
            raise ValueError(f"there is no class {self.target}: 0 to {layer.out_features - 1}")
        if self.by == "class":
            loudest = max(1.0, self.alpha) * float(features(model, layer).sum(dim=1).abs().max())
            if (least := CAUTION * loudest + SILENT) > self.bias:
                raise ValueError(
                    f"bias={self.bias:g} would not silence the other classes: this model's "
                    f"features add up to {loudest:.0f}; let bias be at least {least:.0f}"
                )
        super().check(model, kind)

    def check_setting(self, setting: Setting) -> None:
        """Refuse BatchNorm's statistics of the batch: silenced images would be heard in them."""
        if setting.batchnorm != "frozen" and any(map(is_buffer, travelling(setting.model))):
            raise ScenarioError(
                "model.batchnorm",
                setting.batchnorm,
                "BatchNorm in train mode lets silenced images influence the others; use 'frozen', "
                "or a model with GroupNorm",
            )
        super().check_setting(setting)

    # -- what is sent ----------------------------------------------------------------------------
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Put a head on the first round's backbone, and work out each client's own."""
        history = knowledge.history
        name, _ = classifier(build_model(expression, knowledge.basics.data))
        first = history[0].sent if history else arrays
        backbone = {name: first[name] for name in arrays}  # in this order they come back
        blank = Head(name, torch.zeros_like(arrays[f"{name}.weight"]))
        usual = blank if self.target is None else self._class_head(blank, self.target)
        own = {}
        for senders, views in _by_senders(history):
            answers = [Answer.read(view, name, knowledge) for _, view in views]
            if (head := self._question(answers, blank)) is not None:
                own.update(dict.fromkeys(senders, head.arrays()))
        return Lines(expression, {**backbone, **usual.arrays()}, heads=own)

    def tailor(self, sent: ModelToSend, client: int, server_round: int) -> ModelToSend:  # noqa: ARG002
        """Give a client that has answered before the head of its own next question."""
        if not isinstance(sent, Lines) or client not in sent.heads:
            return sent
        return replace(sent, arrays={**sent.arrays, **sent.heads[client]})

    def _question(self, answers: Sequence[Answer], blank: Head) -> Head | None:
        """Return what to ask these clients next; None for what everybody is asked."""
        roll = next((answer for answer in answers if answer.head.label is None), None)
        if roll is None or self.target is not None:
            return None
        if self.by == "class":
            wanted = roll.rarest(self.most)
            asked = sum(answer.head.label is not None for answer in answers)
            return self._class_head(blank, wanted[asked]) if asked < len(wanted) else None
        label = roll.only_class()
        if label is None:
            return None
        feature = roll.loudest_feature(label)
        threshold = next_threshold(marks(answers, label, feature))
        return None if threshold is None else self._feature_head(blank, label, feature, threshold)

    def _class_head(self, blank: Head, label: int) -> Head:
        weight = torch.zeros_like(blank.weight)
        weight[label] = self.alpha
        bias = torch.full_like(weight[:, 0], self.bias)
        bias[label] = 0
        return Head(blank.name, weight, bias)

    def _feature_head(self, blank: Head, label: int, feature: int, threshold: float) -> Head:
        weight = torch.zeros_like(blank.weight)
        weight[label, feature] = self.beta
        bias = torch.zeros_like(weight[:, 0])
        # Nobody is above an infinite threshold: silence the other classes' logits instead.
        bias[label] = math.log(len(bias) - 1) - min(self.beta * threshold, 1e30)
        return Head(blank.name, weight, bias)

    # -- what is read ----------------------------------------------------------------------------
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Isolate what can be isolated, and let the inner attack reconstruct it."""
        catches: list[Catch] = []
        receipts: list[str] = []
        for senders, indexed in _by_senders(views):
            name, _ = classifier(knowledge.model(indexed[0][1]))
            answers = [Answer.read(view, name, knowledge, index) for index, view in indexed]
            caught = self._by_class(answers) if self.by == "class" else self._by_feature(answers)
            who = f"clients {senders}" if len(senders) > 1 else f"client {senders[0]}"
            for found in caught:
                if isinstance(found, str):
                    receipts.append(f"{who}: {found}")
                else:
                    catches.append(found)
        catches.sort(key=lambda catch: catch.index)
        images = sum(catch.examples for catch in catches)
        told = f"isolated {len(catches)} gradients of {images} images in {len(views)} views"
        if not catches:
            empty = torch.empty(0, *knowledge.basics.data.shape)
            nowhere = torch.empty(0, dtype=torch.int64)
            return Reconstruction(empty, nowhere, receipts=(told, *receipts))
        made = [catch.view for catch in catches]
        counts = {catch.view.label: catch.examples for catch in catches}
        found_there = self.inner.reconstruct(made, knowledge.about(counts))
        places = torch.tensor([catch.index for catch in catches])
        return replace(
            found_there,
            views=places[found_there.views],
            receipts=(told, *receipts, *found_there.receipts),
        )

    def _by_class(self, answers: Sequence[Answer]) -> Iterator[Catch | str]:
        for answer in answers:
            label = answer.head.label
            if label is None:
                continue
            count = round(answer.answered[label].item())
            if 1 <= count <= self.most:
                yield isolated(None, answer, count, self.bias)
            else:
                yield f"{count} images of class {label} in round {answer.view.round}; left out"

    def _by_feature(self, answers: Sequence[Answer]) -> Iterator[Catch | str]:
        roll = next((answer for answer in answers if answer.head.label is None), None)
        label = roll.only_class() if roll is not None else None
        if roll is None or label is None:
            yield "its batch is not of one class; feature fishing isolates nothing there"
            return
        ladder = marks(answers, label, roll.loudest_feature(label))
        if broken := [gap for gap in pairwise(ladder) if not holds_together(*gap)]:
            yield (
                f"{len(broken)} of {len(ladder) - 1} intervals contradict each other: its batch "
                "changed from round to round; left out"
            )
            return
        for low, high in pairwise(ladder):
            if high.answer is not None and holds_one(low, high, self.beta):
                yield isolated(low.answer, high.answer, 1, self.bias)


@dataclass(frozen=True)
class Lines(ModelToSend):
    """A model to send, and the heads that single clients get instead of its own."""

    heads: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def _by_senders(
    views: Sequence[ServerView],
) -> list[tuple[tuple[int, ...], list[tuple[int, ServerView]]]]:
    """Return the views of the same clients together, each with its place among all."""
    groups: dict[tuple[int, ...], list[tuple[int, ServerView]]] = {}
    for index, view in enumerate(views):
        groups.setdefault(view.senders, []).append((index, view))
    return list(groups.items())
