"""MKOR: parameters under which every class has a row of its own, and features keep the image.

Wang, Velipasalar, Gursoy, "Maximum Knowledge Orthogonality Reconstruction with Gradients in
Federated Learning", WACV 2024.

*Decoupling.*  The first linear layer gets equal weights, ``W_i = 1/D``, and bias 0; every later one
the identity.  Logit k is then unit k's, for all the same positive number, and with the derivative
``d_jk`` of image j's loss by logit k the rows of the first layer get (up to one positive factor)

    G_k = sum_j d_jk f_j,   gb_k = sum_j d_jk,   f_j: the features of image j, [D]

*The loss.*  The authors' clients minimize ``NLLLoss`` on the raw logits, where ``d_jk`` is ``-1/B``
for the image's own class and 0 for all others: ``f = G_k / gb_k`` is the feature of the one image
of class k, or the mean of several.  Ordinary cross-entropy, which is what clients here minimize,
has the softmax in it: with equal logits ``gb_k = 1/K - B_k/B``, exactly 0 where every class has one
image, and the attack collapses.  Our remedy sacrifices one class: its last bias is 1000, its
probability 1, all others' exactly 0, and ``d_jk = -1/B`` or 0 again.  Images of that class have no
gradient, and its own row is that of all others together, of the other sign.

*Orthogonality.*  What makes the features tell the image is ``orthogonality.py``.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.attack import Cost, Manipulation, ModelToSend, Paper, Reconstruction, ToyCase
from fedsim.data import DataSpec
from fedsim.models import build_model, load_arrays, travelling
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.isolation.layers import layers_of
from strategies.attacks.analytic.isolation.orthogonality import Plan, image_of, overwrite, planned

CERTAIN = 1000.0
# A class counts as present when its bias moved by more than so many rounding errors of the
# strongest row.
ROUNDING = 8.0


@register("attack", "mkor")
@dataclass(frozen=True, kw_only=True)
class MKOR(Manipulation):
    """Read one image of every class that has just one, by parameters alone.

    Threat model F: no data, no change of the architecture, nothing added.  Of a batch of B with K
    classes equally likely, ``(1 - 1/K)^(B-1)`` are the only one of their class.  Exact on a
    perceptron; through LeNet-5 the image comes back blurred, through VGG-16 between bounds.

    Parameters
    ----------
    sacrificed : int or None
        The class that is given up so that cross-entropy leaves the others alone; None sends the
        authors' own parameters, for clients that minimize NLL on raw logits.

    Fails on several images of a class (their mean comes back), on local training of several steps,
    on activations that let negative numbers through, and BatchNorm.  Dropout in train mode (between
    the linear layers) silences images and spoils none.
    """

    paper: ClassVar[Paper] = Paper(
        title="Maximum Knowledge Orthogonality Reconstruction with Gradients in Federated Learning",
        authors="Wang, Velipasalar, Gursoy",
        venue="WACV",
        year=2024,
        published="the paper's tables were not at hand; its authors' clients minimize NLL on raw "
        "logits, no cross-entropy",
        measured="one linear layer: exact for all 9 classes that are not sacrificed, and under raw "
        "NLL for all 10 (pytest tests/strategies/isolation/test_mkor.py).  VGG-16 at 224, one "
        "CIFAR-10 image a class: raw NLL 23.7 dB, cross-entropy 9.3, with a class sacrificed 23.7 "
        "(-m slow, FEDSIM_TEST_DATA).  LeNet-5 with 12 and 48 maps on CIFAR-10: 19.6 dB.  Photo "
        "tiles: fedsim run scenarios/mkor.toml: 18 of 32 at 20 dB, mean 23.7 dB",
    )
    needs: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.UPDATES, Capability.BASICS, Capability.MANIPULATION}
    )
    toy: ClassVar[ToyCase] = ToyCase(
        scenario={
            "threat-model": "F",
            "attack": "mkor",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[32])",
            "federation.clients": 8,
            "federation.local": "fedsgd(batch_size=4, lr=0.1)",
        },
        # 32 (1 - 1/10)^3 9/10 = 21 of 32 are the only one of a class that is not sacrificed; seeds
        # 0 to 3 and 7 gave 14 to 25.
        figure="leak.exact",
        low=10.0,
        high=29.0,
    )

    sacrificed: Annotated[int, Field(ge=0)] | None = 0

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse uploaded weights, and a model whose features would not show the image."""
        if kind == "weights":
            raise ValueError("one local step tears the equal rows apart; use fedsgd")
        spec = model.spec
        assert isinstance(spec, DataSpec)
        taken_apart(model, spec)
        if self.sacrificed is not None and self.sacrificed >= spec.num_classes:
            raise ValueError(f"sacrificed= is a class, 0 to {spec.num_classes - 1}")

    # -- what is sent ----------------------------------------------------------------------------
    def craft(
        self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge
    ) -> ModelToSend:
        """Overwrite every layer; filters that the features have no use for stay as they are."""
        spec = knowledge.basics.data
        model = build_model(expression, spec).to(next(iter(arrays.values())).dtype)
        load_arrays(model, arrays)
        before, linear, plan = taken_apart(model, spec)
        overwrite(before, plan, spec.shape[0])
        with torch.no_grad():
            for layer in linear.values():
                torch.nn.init.eye_(layer.weight)
                layer.bias.zero_()
            first, *_, last = [*linear.values()] * 2  # one layer may be both
            first.weight.fill_(1 / first.in_features)
            if self.sacrificed is not None:
                last.bias[self.sacrificed] = CERTAIN
        return ModelToSend(expression, travelling(model))

    # -- what is read ----------------------------------------------------------------------------
    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Read every class whose row moved, the rows of fewest images first."""
        started = time.perf_counter()
        knowledge.require(Capability.UPDATES)
        shape = knowledge.basics.data.shape
        images, labels, scores, sources, receipts = [], [], [], [], []
        for index, view in enumerate(views):
            features, classes, strength = read_classes(view, knowledge.basics.data)
            # Noise moves every row; a batch cannot be of more classes than it has images.
            most = knowledge.most_examples(view)
            strongest = strength.argsort(descending=True)[:most].sort().values
            features = [features[at] for at in strongest.tolist()]
            classes, strength = classes[strongest], strength[strongest]
            images += features
            labels.append(classes)
            # The weaker a row, the fewer images it is the mean of.
            scores.append(strength.min() / strength if len(strength) else strength)
            sources.append(torch.full((len(classes),), index))
            receipts.append(f"read the rows of {len(classes)} classes in view {view.label}")
        return Reconstruction(
            examples=torch.stack(images).float() if images else torch.empty(0, *shape),
            views=torch.cat(sources) if sources else torch.empty(0, dtype=torch.int64),
            labels=torch.cat(labels) if labels else None,
            scores=torch.cat(scores).float() if scores else None,
            cost=Cost(seconds=time.perf_counter() - started),
            receipts=tuple(receipts),
        )


def taken_apart(
    model: nn.Module, spec: DataSpec
) -> tuple[dict[str, nn.Module], dict[str, nn.Linear], Plan]:
    """Return the layers before the first linear one, the linear ones, and the convolutions' plan.

    Raises
    ------
    ValueError
        If the attack does not fit the model.
    """
    layers = layers_of(model)
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    if not linear:
        raise ValueError("there is no linear layer whose rows could be read; use mlp or vgg16")
    names = list(layers)
    start = names.index(next(iter(linear)))
    for name in names[start:]:
        layer = layers[name]
        if not isinstance(layer, nn.Linear | nn.ReLU | nn.Sigmoid | nn.Dropout):
            raise ValueError(f"{name} is {type(layer).__name__}, which mixes or hides the classes")
        if isinstance(layer, nn.Linear) and (
            layer.bias is None or layer.out_features < spec.num_classes
        ):
            raise ValueError(
                f"{name} needs a bias and {spec.num_classes} units, one for each class, "
                f"not {layer.out_features}"
            )
    before = {name: layers[name] for name in names[:start]}
    return before, linear, planned(before, spec.shape[0])


def read_classes(view: ServerView, spec: DataSpec) -> tuple[list[Tensor], Tensor, Tensor]:
    """Read one view.

    Returns
    -------
    images : list of Tensor
        ``[C, H, W]`` float64 in ``[0, 1]``, one for each class that is there.
    classes, strength : Tensor
        Which, and by how much the row's bias moved.

    Raises
    ------
    ValueError
        If these clients were sent other parameters.
    """
    with torch.device("meta"):
        model = build_model(view.model, spec)
    before, linear, plan = taken_apart(model, spec)
    name = next(iter(linear))
    sent = view.sent[f"{name}.weight"]
    if not torch.equal(sent, sent[:1, :1].expand_as(sent)):
        raise ValueError(f"view {view.label} is of a model whose classes are not decoupled")
    update = view.update()
    moved = update[f"{name}.bias"].double()[: spec.num_classes]
    floor = ROUNDING * torch.finfo(sent.dtype).eps * moved.abs().nan_to_num(0, 0, 0).max()
    classes = (moved < -floor).nonzero().flatten()
    features = update[f"{name}.weight"][classes].double() / moved[classes].unsqueeze(1)
    side = before_linear(before, spec)
    images = [image_of(one.view(side), plan, spec.shape) for one in features]
    return images, classes, -moved[classes]


def before_linear(layers: dict[str, nn.Module], spec: DataSpec) -> torch.Size:
    """Return the shape ``[F, h, w]`` of the last maps; the layers are on the meta device."""
    maps = torch.empty(1, *spec.shape, device="meta")
    for layer in layers.values():
        if not isinstance(layer, nn.Flatten):
            maps = layer(maps)
    return maps.shape[1:]
