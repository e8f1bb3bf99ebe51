"""Cascading peeling: examples that are alone at some unit are read, verified, and taken away.

For the first fully connected layer, ``z = W x + b`` with m units, a batch of B examples gives

    dL/dW = 1/B sum_b g_b x_b^T,   dL/db = 1/B sum_b g_b,   g_b = dL_b/dz_b ``[m]``.

A unit i that is active on a single example has ``dL/dW_i / dL/db_i = x_b``
(:mod:`~strategies.attacks.analytic.closed_form.linear_inversion`).  The attacker holds the network:
it sends each ratio forward and each label back, and so knows the whole g that an example there
would have.  What it verified it subtracts, as ``g x^T / B``, from the gradient: units that two
examples shared are another's alone now, and it goes on until nothing more is verified.
Shariati and Meybodi, 2026, for passive servers; the ratio is Phong et al. 2017.

A ratio is verified here if, for one label,

- g lies in the span of the columns of dL/dW: that has rank B, so that for ``B < m`` no mixture of
  examples passes (decided here: the paper's own certificate was not read), and
- g at its unit is ``dL/db_i`` up to the factor that all such units share: 1/B, or less where the
  client clipped.

Labels come with the images.  What ends it: a batch in which every unit is shared (large batches,
images that are alike), noise, and local steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
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
from strategies.attacks.analytic.closed_form.spear import label_slopes

# Two verified ratios are the same example if no input differs by more.
SAME = 1e-3
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
        want 1e-3; float64 ones stand 1e-8.
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
        measured="mlp(hidden=[1000]), default weights, share of a batch of 64 / 128 / 256 that "
        "came back at 60 dB, mean of two: CIFAR-10 1.00 / .98 / .20 in float32, 1.00 / 1.00 / .20 "
        "in float64; photo tiles 1.00 / .98 / .64 and 1.00 / 1.00 / 1.00 (FEDSIM_TEST_DATA=... "
        "python -m pytest -m slow -s tests/strategies/passive/test_peeling.py)",
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
        """Refuse weights, and a model without a biased fully connected layer on the pixels."""
        reading_layer(model, self.layer)
        if kind == "weights":
            raise ValueError(
                "peeling subtracts whole gradients, and weights after local training are none; "
                "use federation.local = 'fedsgd(...)', or linear-inversion"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse batches that the layer's rank cannot tell from mixtures."""
        layer = reading_layer(setting.model, self.layer).name
        most = min(setting.model.get_parameter(f"{layer}.weight").shape) - 1
        mixed = sum(setting.uploads[: setting.cohort if setting.channel.aggregates else 1])
        if mixed > most:
            raise ValueError(
                f"an update mixes {mixed} examples and more, and {layer!r} can verify {most}; "
                "use a wider layer (mlp(hidden=[...])), or let fewer examples come together"
            )

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
            found, rounds = Batch.of(view, model, reading, count, self.tolerance).peeled()
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
    """Verified examples: inputs of the layer ``[r, n]``, labels, scores and errors ``[r]``, and g.

    ``slopes`` is ``[r, m]``: what each would contribute to dL/db.
    """

    inputs: Tensor
    labels: Tensor
    scores: Tensor
    errors: Tensor
    slopes: Tensor

    def take(self, rows: Tensor) -> "Peeled":
        """Return some of the examples."""
        return Peeled(*(value[rows] for value in vars(self).values()))

    @staticmethod
    def joined(parts: Sequence["Peeled"]) -> "Peeled":
        """Return all examples of several rounds."""
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
    scale : float
        What each example's own g was multiplied by; nan until one was found.
    """

    model: nn.Module
    reading: ReadingLayer
    weight: Tensor
    bias: Tensor
    span: Tensor
    count: int
    tolerance: float
    scale: float = nan

    @classmethod
    def of(
        cls, view: ServerView, model: nn.Module, reading: ReadingLayer, count: int, tolerance: float
    ) -> "Batch":
        """Read a view's update."""
        update = view.update()
        names = f"{reading.name}.weight", f"{reading.name}.bias"
        parameters = dict(model.named_parameters())
        zeros = [torch.zeros_like(parameters[name]) for name in names]
        sums = [
            update[name].to(zero).nan_to_num(0, 0, 0) if name in update else zero
            for name, zero in zip(names, zeros, strict=True)
        ]
        factors = factorize(sums[0], count)
        span = factors.left / len(sums[0]) ** 0.5
        return cls(model, reading, sums[0], sums[1], span, count, tolerance)

    def peeled(self) -> tuple[Peeled, int]:
        """Take away what can be verified until there is nothing more; also count the rounds."""
        parts, left = [], self.count
        while left > 0:
            found = self._alone()
            parts.append(found := found.take(_each_once(found, self.tolerance)[:left]))
            if len(found.labels) == 0:
                break
            self.weight -= found.slopes.T @ found.inputs
            self.bias -= found.slopes.sum(dim=0)
            left -= len(found.labels)
        return Peeled.joined(parts), len(parts)

    def _alone(self) -> Peeled:
        """Return the ratio of each unit that could be an image, with its likeliest label."""
        spec: DataSpec = self.model.spec  # type: ignore[assignment]
        units = (self.bias.abs() > SILENT * self.bias.abs().max()).nonzero().squeeze(1)
        inputs = self.weight[units] / self.bias[units, None]
        pixels = (inputs - self.reading.offset) / self.reading.scale
        image = ((pixels > -self.tolerance) & (pixels < 1 + self.tolerance)).all(dim=1)
        units, inputs, pixels = units[image], inputs[image], pixels[image]
        slopes = label_slopes(self.model, self.reading.name, pixels.view(-1, *spec.shape))
        each, here = torch.arange(len(units)), self.bias[units]
        beyond = slopes - (slopes @ self.span) @ self.span.T
        size = slopes.norm(dim=2).clamp_min(torch.finfo(slopes.dtype).tiny)
        outside, labels = (beyond.norm(dim=2) / size).min(dim=0)
        slopes = slopes[labels, each]  # [r, m]
        there = slopes[each, units]
        if isnan(self.scale):
            fits = outside < self.tolerance
            self.scale = float((here[fits] / there[fits]).median())  # nan of none
        slopes = self.scale * slopes
        off = (slopes[each, units] - here).abs() / here.abs()
        return Peeled(inputs, labels, 1 - outside, torch.maximum(off, outside), slopes)


def _each_once(found: Peeled, tolerance: float) -> Tensor:
    """Return the places of what is verified: of each example that is there, the least error's."""
    chosen: list[int] = []
    for place in found.errors.argsort().tolist():
        if not found.errors[place] < tolerance:
            break
        apart = (found.inputs[chosen] - found.inputs[place]).abs().amax(dim=1)
        if bool((apart > SAME).all()):
            chosen.append(place)
    return torch.tensor(chosen, dtype=torch.int64)
