"""What a model says of images that the server has, for rules that need its typical prediction.

The images are surrogate ones where they are granted, else noise with the data's public mean and
standard deviation.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.rule import classifier

PROBES = 256


@dataclass(frozen=True)
class Probe:
    """What came out, float64 on the CPU.

    Attributes
    ----------
    probabilities : Tensor
        ``[N, K]``.
    features : Tensor
        ``[N, d]``: what the last layer reads.
    labels : Tensor or None
        ``[N]`` int64 of surrogate images; noise has none.
    """

    probabilities: Tensor
    features: Tensor
    labels: Tensor | None


def probe(model: nn.Module, view: ServerView, knowledge: Knowledge) -> Probe:
    """Run the model on at most ``PROBES`` images; the same ones whenever it is asked for a view."""
    parameter = next(model.parameters())
    generator = knowledge.generator(view.label, "mean prediction")
    labels: Tensor | None = None
    if Capability.SURROGATE in knowledge.granted:
        surrogate = knowledge.surrogate
        chosen = torch.randperm(len(surrogate), generator=generator)[:PROBES]
        images, labels = surrogate.batch(chosen, parameter.dtype)
    else:
        spec = knowledge.basics.data
        noise = torch.randn(PROBES, *spec.shape, generator=generator)
        std, mean = (torch.tensor(v).view(-1, 1, 1) for v in (spec.std, spec.mean))
        images = (noise * std + mean).to(parameter.dtype)
    # A copy: in train mode a forward pass moves BatchNorm's running statistics.
    model = copy.deepcopy(model)
    read: list[Tensor] = []
    layer = classifier(model)[1]
    hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.no_grad():
        logits: Tensor = model(images.to(parameter.device))
    hook.remove()
    return Probe(logits.double().softmax(dim=1).cpu(), read[0].double().cpu(), labels)
