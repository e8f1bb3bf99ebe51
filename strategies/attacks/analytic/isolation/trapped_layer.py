"""The first fully connected ReLU layer of a model as a trap: set, turned up, and read again.

What the attacks with trap weights share (Boenisch et al., EuroS&P 2023, and its successor against
secure aggregation): the model that is sent has the honest one's architecture and names.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedsim.attack import Cost, Reconstruction
from fedsim.models import build_model, load_arrays, travelling
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.isolation.agreement import isolated, noise_of
from strategies.attacks.analytic.isolation.passage import (
    Passage,
    PixelMap,
    clear,
    find_passage,
    pixel_map,
)

# Pixels may miss [0, 1] by so many expected errors, root mean square, and by rounding.
OUTSIDE, ROUNDING = 2.0, 1e-3
# A pixel lies on a level of a picture within so much of the distance of two: a tenth do by chance.
ON_LEVEL = 0.05


@dataclass(frozen=True)
class TrappedLayer:
    """A model whose pixels reach its first fully connected ReLU layer as they are, float64."""

    model: nn.Module
    passage: Passage
    pixels: PixelMap

    @classmethod
    def opened(cls, model: nn.Module, generator: torch.Generator) -> "TrappedLayer":
        """Clear the way to the layer, in place.

        Raises
        ------
        ValueError
            If the model has no such layer, or its pixels cannot be led there.
        """
        model = model.double().cpu().eval()
        passage = find_passage(model)
        clear(model, passage, generator)
        return cls(model, passage, pixel_map(model, passage.layer))

    @property
    def layer(self) -> nn.Linear:
        """The layer that holds the traps."""
        layer = self.model.get_submodule(self.passage.layer)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def after(self) -> nn.Linear:
        """The linear layer behind its ReLU."""
        after = self.model.get_submodule(self.passage.after)
        assert isinstance(after, nn.Linear)
        return after

    def set(self, rows: tuple[Tensor, Tensor]) -> None:
        """Write rows (``[n, D]``, ``[n]``) that act on pixels in ``[0, 1]``."""
        weight, bias = self.pixels.rows(*rows, self.layer.in_features)
        with torch.no_grad():
            self.layer.weight.copy_(weight)
            self.layer.bias.copy_(bias)

    def turn_up(self, gain: float) -> None:
        """Make the rows' gradients ``gain`` times as large; the model computes the same.

        ReLU commutes with positive factors: rows and biases over ``gain``, the next layer's
        weights times it.
        """
        with torch.no_grad():
            self.layer.weight.div_(gain)
            self.layer.bias.div_(gain)
            self.after.weight.mul_(gain)

    def signal_gradient(self, images: Tensor, labels: Tensor) -> float:
        """Return by how much a row's output moves an example's loss: the mean of ``|dL_j/dh_i|``.

        ``images`` are ``[B, C, H, W]`` in ``[0, 1]``, ``labels`` ``[B]``; not the clients'.
        """
        heard: list[Tensor] = []
        handle = self.after.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        loss = cross_entropy(self.model(images.double()), labels, reduction="sum")
        handle.remove()
        (gradient,) = torch.autograd.grad(loss, heard[0])
        return max(float(gradient.abs().mean()), 1e-12)

    def energies(self, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """Return squared gradient norms: of this layer, the next one's weight, all the others."""
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        loss = cross_entropy(self.model(images.double()), labels)
        gradients = torch.autograd.grad(loss, parameters)
        own = {self.passage.layer + ".weight", self.passage.layer + ".bias"}
        after, layer, next_one, rest = self.passage.after + ".weight", 0.0, 0.0, 0.0
        for name, gradient in zip(names, gradients, strict=True):
            energy = float(gradient.square().sum())
            layer += energy * (name in own)
            next_one += energy * (name == after)
            rest += energy * (name != after and name not in own)
        return max(layer, 1e-300), next_one, rest

    def arrays(self, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is sent, in the honest model's precision."""
        return {n: t.to(like[n].dtype).clone() for n, t in travelling(self.model).items()}


def trapped_layer(expression: str, arrays: dict[str, Tensor], knowledge: Knowledge) -> TrappedLayer:
    """Open the honest model that is about to be sent."""
    model = build_model(expression, knowledge.basics.data)
    load_arrays(model, arrays)
    return TrappedLayer.opened(model, knowledge.generator("traps", "silent filters"))


def refuse_unfit(model: nn.Module, kind: str) -> None:
    """Refuse a model without a reachable layer, or whose way to it drifts in local training.

    Raises
    ------
    ValueError
    """
    opened = TrappedLayer.opened(model, torch.Generator())
    if kind == "weights" and opened.passage.convolutions:
        raise ValueError(
            "in local training the convolutions before the traps drift, and pixels no longer pass; "
            "let clients upload gradients (fedsgd), or use mlp(hidden=[1000])"
        )


def own_images(knowledge: Knowledge, most: int, *, surrogate: bool = True) -> tuple[Tensor, Tensor]:
    """Return at most ``most`` surrogate images ``[S, C, H, W]`` in ``[0, 1]``, and labels.

    Without ``surrogate`` data: noise of the public mean and standard deviation.
    """
    spec, generator = knowledge.basics.data, knowledge.generator("traps", "own images")
    if surrogate:
        data = knowledge.surrogate
        return data.batch(torch.randperm(len(data), generator=generator)[:most])
    mean, std = (torch.tensor(facts).view(-1, 1, 1) for facts in (spec.mean, spec.std))
    noise = mean + std * torch.randn(most, *spec.shape, generator=generator)
    return noise.clamp(0, 1), torch.randint(spec.num_classes, (most,), generator=generator)


def read_views(
    views: Sequence[ServerView], knowledge: Knowledge, *, sybils: int = 0
) -> Reconstruction:
    """Read every image that some row of the trapped layer holds alone, from each view.

    ``sybils`` of a view's examples are the attacker's own, one for each of its devices.  The images
    with most rows that agree come first, as many as the update can be of.  The score is the number
    of those rows, the share of pixels that lie on one of the 256 levels of a picture (what one row
    alone holds of one image is exact, and a mixture lies anywhere), and the contrast, which is
    below one half (a mixture is flat).
    """
    started = time.perf_counter()
    shape = knowledge.basics.data.shape
    examples, scores, sources, receipts = [torch.empty(0, *shape)], [torch.empty(0)], [], []
    for index, view in enumerate(views):
        most = knowledge.most_examples(view)
        most = None if most is None else most - sybils
        images, score, receipt = _read(view, knowledge, most)
        examples.append(images.clamp(0, 1).float().view(-1, *shape))
        scores.append(score.float())
        sources += [index] * len(score)
        receipts.append(receipt)
        knowledge.progress(index + 1, len(views), "")
    return Reconstruction(
        examples=torch.cat(examples),
        views=torch.tensor(sources, dtype=torch.int64),
        scores=torch.cat(scores),
        cost=Cost(seconds=time.perf_counter() - started),
        receipts=tuple(receipts),
    )


def _read(view: ServerView, knowledge: Knowledge, most: int | None) -> tuple[Tensor, Tensor, str]:
    """Return at most so many unclamped images ``[K, D]``, scores ``[K]`` and a receipt."""
    layer, weight, bias, pixels = layer_gradient(view, knowledge)
    found = isolated(weight, bias, _noise(view, layer, weight, bias))
    images = pixels.pixels(found.inputs)
    error = found.error / pixels.scale.abs().min()
    outside = (images - images.clamp(0, 1)).square().mean(dim=1).sqrt()
    valid = images.isfinite().all(dim=1) & (outside <= OUTSIDE * error + ROUNDING)
    images, rows = images[valid], found.rows[valid]
    off_level = (255 * images - (255 * images).round()).abs()
    score = rows + (off_level < ON_LEVEL).double().mean(dim=1)
    score = score + images.clamp(0, 1).std(dim=1, correction=0)
    best = score.argsort(descending=True, stable=True)[:most]
    receipt = (
        f"returned {len(best)} candidates of view {view.label}: {int((bias != 0).sum())} of "
        f"{len(bias)} rows heard something, {int((rows[best] > 1).sum())} are held by rows that "
        "agree"
    )
    return images[best], score[best], receipt


def layer_gradient(view: ServerView, knowledge: Knowledge) -> tuple[str, Tensor, Tensor, PixelMap]:
    """Return the layer's name, its gradients at the pixels (``[n, D]``, ``[n]``, float64), and
    their map.
    """
    model = knowledge.model(view)
    layer = find_passage(model).layer
    pixels = pixel_map(model, layer)
    update = view.update()
    weight, bias = update[layer + ".weight"], update[layer + ".bias"]
    return layer, weight[:, pixels.positions].double(), bias.double(), pixels


def _noise(view: ServerView, layer: str, weight: Tensor, bias: Tensor) -> float:
    """Return the noise in an entry; uploaded weights are also rounded to their own digits."""
    sigma = noise_of(weight, bias, len(view.senders))
    if view.kind == "gradient":
        return sigma
    carrier = view.sent[f"{layer}.weight"]
    rounding = torch.finfo(carrier.dtype).eps * sqrt(float(carrier.double().square().mean()))
    return max(sigma, rounding)
