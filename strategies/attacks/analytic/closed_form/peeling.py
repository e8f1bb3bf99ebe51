"""Cascading peeling: examples that are alone at some unit are read, verified, and taken away.

For the first fully connected layer, ``z = W x + b`` with m units, a batch of B examples gives

    dL/dW = 1/B sum_b g_b x_b^T,   dL/db = 1/B sum_b g_b,   g_b = dL_b/dz_b ``[m]``.

A unit i that is active on a single example has ``dL/dW_i / dL/db_i = x_b``
(:mod:`~strategies.attacks.analytic.closed_form.linear_inversion`).  The attacker holds the network:
it sends each ratio forward and each label back, and so knows the whole g that an example there
would have.  What it verified it subtracts, as ``g x^T / B``, from the gradient: units that two
examples shared are another's alone now, and it goes on until nothing more is verified.
Shariati and Meybodi, 2026, for passive servers; the ratio is Phong et al. 2017.

A ratio is verified here (the paper's own certificate was not read) if, for one label,

- g lies in the span of the columns of dL/dW, which has rank B: a mixture of examples does not, as
  long as more units than B are active; and
- g at its unit is ``dL/db_i`` up to ``k/B``: k is 1, or how often the example is in the batch.  A
  client that clipped gave all one smaller factor; three examples that agree on it are believed.

Labels come with the images.  What ends it: a batch in which every unit is shared (large batches,
images that are alike), noise, local steps, soft labels, rounding, and sums over clients each of
which clipped by a factor of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fedsim.attack import Attack, Cost, Paper, Reconstruction, Setting, ToyCase
from fedsim.data import DataSpec
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.analytic.closed_form.linear_inversion import ReadingLayer, reading_layer
from strategies.attacks.analytic.closed_form.sparse_columns import factorize
from strategies.attacks.analytic.closed_form.spear import label_slopes, mixed_examples, rectified

# Two verified ratios are of the same example if their g are this parallel.
PARALLEL = 0.99
# An example is believed to be there so many times, at most: any number is near some multiple.
MOST_COPIES = 3
# So many more units than examples must be active: with fewer any mixture could lie in the span.
SPARE = 8
# So many examples must agree on a factor that clipping left.
AGREEING = 3
# Numbers in the gradients that are computed at once, at most.
AT_ONCE = 2**25
# Units whose dL/db is this small beside the largest cannot be divided.
SILENT = 1e-7


@register("attack", "peeling")
@dataclass(frozen=True, kw_only=True)
class Peeling(Attack):
    """Recover what can be verified of each batch, in float64.

    Threat model B: it knows how many examples an update is of.  Cost: in each round one forward
    pass for each unit, and one back for each label.  The score of a candidate is 1 less the share
    of its gradient that lies outside the span: 1 for an exact one.

    Parameters
    ----------
    tolerance : float
        Largest relative error of a verified g, at its unit and outside the span.  float32 uploads
        want 1e-3.
    layer : str or None
        Name of the fully connected layer; None takes the first one that reads the pixels.
    """

    paper = Paper(
        title="Cascading peeling (the paper itself was not at hand, nor its title)",
        authors="Shariati, Meybodi",
        venue="2026",
        year=2026,
        published="1,000 units, weights N(0, 0.25), share of a batch of 64 / 128: CIFAR-10 .994 / "
        ".666, CIFAR-100 1.0 / 1.0, ImageNet .997 / .947, MNIST .484 / .017",
        measured="CIFAR-10, float64: weights N(0, 0.25), batches of 64 / 128: .984 / .984; default "
        "weights, 64 / 128 / 256, mean of two: 1.00 / 1.00 / .20; photo tiles all of them "
        "(FEDSIM_TEST_DATA=... python -m pytest -m slow -s "
        "tests/strategies/passive/test_peeling.py)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS})
    unit = "views"
    toy = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "peeling",
            "data.dataset": "photo-tiles",
            "model.name": "mlp(hidden=[400])",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=8, lr=0.1)",
        },
        figure="leak.psnr.mean",
        low=100.0,
        high=199.0,
    )

    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    layer: str | None = None

    def check(self, model: nn.Module, kind: str) -> None:
        """Refuse weights, and a model that does not read pixels by such a layer and a ReLU."""
        name = reading_layer(model, self.layer).name
        if not rectified(model, name):
            raise ValueError(
                f"peeling wants units that some examples leave off, and no ReLU is right behind "
                f"{name!r}; use mlp(hidden=[200]), or cocktail-party"
            )
        if kind == "weights":
            raise ValueError(
                "peeling subtracts whole gradients, and weights after local training are none; "
                "use federation.local = 'fedsgd(...)', or linear-inversion"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches that the layer's rank cannot tell from mixtures."""
        mixed_examples(setting, reading_layer(setting.model, self.layer).name)

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return what was verified of each view; a view may have nothing."""
        shape = knowledge.basics.data.shape
        examples, labels = [torch.empty(0, *shape)], [torch.empty(0, dtype=torch.int64)]
        scores, sources, evaluations, receipts = [torch.empty(0)], list[int](), 0, []
        for index, view in enumerate(views):
            model = knowledge.model(view).double().cpu().eval()
            reading, count = reading_layer(model, self.layer), knowledge.num_examples(view)
            knowledge.progress(index + 1, len(views), "")
            if not count < min(model.get_parameter(f"{reading.name}.weight").shape):
                receipts.append(f"{view.label}: {count} examples are too many for {reading.name}")
                continue
            batch = Batch.of(view, model, reading, count, self.tolerance)
            if (active := int((batch.bias != 0).sum())) < count + SPARE:
                receipts.append(
                    f"{view.label}: 0 of {count}: {active} units are active, and it takes "
                    f"{count + SPARE} to tell {count} examples from mixtures of them"
                )
                continue
            found, rounds = batch.peeled()
            pixels = (found.inputs - reading.offset) / reading.scale
            examples.append(pixels.clamp(0, 1).view(-1, *shape))
            labels.append(found.labels)
            scores.append(found.scores)
            sources += [index] * len(found.labels)
            evaluations += rounds * knowledge.basics.data.num_classes * found.slopes.shape[1]
            receipts.append(f"{view.label}: {len(found.labels)} of {count} in {rounds} rounds")
        return Reconstruction(
            examples=torch.cat(examples),
            views=torch.tensor(sources, dtype=torch.int64),
            labels=torch.cat(labels),
            scores=torch.cat(scores),
            cost=Cost(gradient_evaluations=evaluations),
            receipts=tuple(receipts),
        )


@dataclass
class Peeled:
    """Ratios that could be examples.

    Attributes
    ----------
    inputs : Tensor
        ``[r, n]``: of the layer.
    labels, scores : Tensor
        ``[r]``: the likeliest label, and 1 less the share of g outside the span.
    slopes : Tensor
        ``[r, m]``: g.
    shares : Tensor
        ``[r]``: what g at its unit would have to be multiplied by.
    """

    inputs: Tensor
    labels: Tensor
    scores: Tensor
    slopes: Tensor
    shares: Tensor

    def take(self, rows: Tensor) -> "Peeled":
        """Return some of the ratios."""
        return Peeled(*(value[rows] for value in vars(self).values()))

    @staticmethod
    def joined(parts: Sequence["Peeled"]) -> "Peeled":
        """Return all ratios of several parts."""
        rows = zip(*(vars(part).values() for part in parts), strict=True)
        return Peeled(*(torch.cat(values) for values in rows))


@dataclass
class Batch:
    """What is left of the gradient of one batch, and what does not change.

    Attributes
    ----------
    model : nn.Module
        float64, in eval mode.
    reading : ReadingLayer
    weight, bias : Tensor
        ``[m, n]`` and ``[m]`` float64: what is left.
    span : Tensor
        ``[m, r]``: orthonormal, what the columns of D lie in.
    count : int
        How many examples there are.
    tolerance : float
    factor : float
        What an example's own g is multiplied by: 1/B, or less where the client clipped.
    """

    model: nn.Module
    reading: ReadingLayer
    weight: Tensor
    bias: Tensor
    span: Tensor
    count: int
    tolerance: float
    factor: float

    @classmethod
    def of(
        cls, view: ServerView, model: nn.Module, reading: ReadingLayer, count: int, tolerance: float
    ) -> "Batch":
        """Read a view's update."""
        update = view.update()
        names = f"{reading.name}.weight", f"{reading.name}.bias"
        parameters = dict(model.named_parameters())
        zeros = [torch.zeros_like(parameters[name]) for name in names]
        weight, bias = (
            update[name].to(zero).nan_to_num(0, 0, 0) if name in update else zero
            for name, zero in zip(names, zeros, strict=True)
        )
        span = factorize(weight, count).left / len(weight) ** 0.5
        return cls(model, reading, weight, bias, span, count, tolerance, 1 / count)

    def peeled(self) -> tuple[Peeled, int]:
        """Take away what can be verified until there is nothing more; also count the rounds.

        An example that is there k times is returned k times.
        """
        parts, left = [], self.count
        while left > 0:
            found = self._verified(self._ratios())
            copies = (found.shares / self.factor).round().long()
            whole = found.take(torch.arange(len(copies)).repeat_interleave(copies)[:left])
            parts.append(whole)
            if len(whole.labels) == 0:
                break
            self.weight -= self.factor * whole.slopes.T @ whole.inputs
            self.bias -= self.factor * whole.slopes.sum(dim=0)
            left -= len(whole.labels)
        return Peeled.joined(parts), len(parts)

    def _ratios(self) -> Peeled:
        """Return the ratio of each unit that is an image and whose g lies in the span."""
        units = (self.bias.abs() > SILENT * self.bias.abs().max()).nonzero().squeeze(1)
        inputs = self.weight[units] / self.bias[units, None]
        pixels = (inputs - self.reading.offset) / self.reading.scale
        image = ((pixels > -self.tolerance) & (pixels < 1 + self.tolerance)).all(dim=1)
        units, inputs, pixels = units[image], inputs[image], pixels[image]
        spec: DataSpec = self.model.spec  # type: ignore[assignment]
        size = max(1, AT_ONCE // (spec.num_classes * len(self.bias)))
        parts = torch.arange(len(units)).chunk(max(1, -(-len(units) // size)))
        return Peeled.joined([self._in_span(units[p], inputs[p], pixels[p], spec) for p in parts])

    def _in_span(self, units: Tensor, inputs: Tensor, pixels: Tensor, spec: DataSpec) -> Peeled:
        """Return those of some ratios whose g lies in the span for a label."""
        slopes = label_slopes(self.model, self.reading.name, pixels.view(-1, *spec.shape))
        beyond = slopes - (slopes @ self.span) @ self.span.T
        size = slopes.norm(dim=2).clamp_min(torch.finfo(slopes.dtype).tiny)
        outside, labels = (beyond.norm(dim=2) / size).min(dim=0)
        each = torch.arange(len(units))
        slopes = slopes[labels, each]  # [r, m]
        shares = self.bias[units] / slopes[each, units]
        found = Peeled(inputs, labels, 1 - outside, slopes, shares)
        return found.take((outside < self.tolerance).nonzero().squeeze(1))

    def _verified(self, found: Peeled) -> Peeled:
        """Return each example once whose share is a whole number of times the common factor."""
        whole = self._whole(found.shares)
        if not whole.any() and len(found.shares) >= AGREEING:
            alike = ((found.shares[:, None] / found.shares - 1).abs() < self.tolerance).sum(dim=1)
            agreed = float(found.shares[alike.argmax()])
            examples = found.take((found.shares / agreed - 1).abs() < self.tolerance)
            if 0 < agreed < self.factor and len(_each_once(examples)) >= AGREEING:
                self.factor = agreed
                whole = self._whole(found.shares)
        found = found.take(whole)
        return found.take(_each_once(found))

    def _whole(self, shares: Tensor) -> Tensor:
        """Say which shares are the factor, or a small multiple of it."""
        times = shares / self.factor
        copies = times.round()
        return (
            (copies >= 1) & (copies <= MOST_COPIES) & ((times / copies - 1).abs() < self.tolerance)
        )


def _each_once(found: Peeled) -> Tensor:
    """Return the places of the best ratio of each example that is there."""
    unit = found.slopes / found.slopes.norm(dim=1, keepdim=True)
    chosen: list[int] = []
    for place in found.scores.argsort(descending=True).tolist():
        if bool((unit[chosen] @ unit[place] < PARALLEL).all()):
            chosen.append(place)
    return torch.tensor(chosen, dtype=torch.int64)
