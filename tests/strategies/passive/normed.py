"""Clients whose network has BatchNorm: a little training, captures, and what an attack is told."""

import dataclasses

import torch
from torch import Tensor, nn

from fedsim.data import Split
from fedsim.models import travelling
from fedsim.models.statistics import layer_statistics
from fedsim.threat import Knowledge, Statistics, TrainingDetails
from fedsim.view import ServerView
from tests.strategies.passive.honest import Honest, batch, cifar10, floor_psnr, matched_psnr, spec

CIFAR = dataclasses.replace(
    spec(), mean=(0.4915, 0.4823, 0.4468), std=(0.247, 0.2435, 0.2616), num_classes=10
)


def trained(client: Honest, split: Split, steps: int) -> dict[str, Tensor]:
    """Return what travels after some steps of SGD at batch size 64, BatchNorm in train mode."""
    model, generator = client.model().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(split), (64,), generator=generator)
        images, labels = split.batch(chosen, client.dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in travelling(model).items()}


@dataclasses.dataclass(frozen=True)
class Captured:
    """What some clients hold, what they sent, and what a threat model E adversary is told."""

    client: Honest
    batches: list[tuple[Tensor, Tensor]]
    views: list[ServerView]
    surrogate: Split

    @classmethod
    def of(
        cls,
        client: Honest,
        split: Split,
        size: int,
        count: int,
        *,
        steps: int = 0,
        surrogate: int = 500,
        differ: bool = True,
    ) -> "Captured":
        """Let ``count`` clients of ``size`` images answer a model trained on surrogate images."""
        known, private = torch.arange(len(split)).split([surrogate, len(split) - surrogate])
        others, private = split.subset(known), split.subset(private)
        sent = trained(client, others, steps) if steps else None
        draw = distinct if differ else batch
        batches = [draw(private, size, seed, client.dtype) for seed in range(count)]
        views = [client.gradient(*b, client=i, sent=sent) for i, b in enumerate(batches)]
        return cls(client, batches, views, others)

    def knowledge(self, oracles: tuple[str, ...] = (), threat_model: str = "E") -> Knowledge:
        """Return what the adversary is told, with the oracles that are named."""
        size = len(self.batches[0][0])
        truth = {view.label: held for view, held in zip(self.views, self.batches, strict=True)}
        grants = {
            "labels": lambda view: truth[view.label][1],
            "batchnorm": lambda view: layer_statistics(told.model(view), truth[view.label][0]),
        }
        told = Knowledge(
            threat_model,
            data=self.client.spec,
            training=TrainingDetails("gradient", 0.1, size, 1, 0.0, 0.0),
            seed=11,
            device=torch.device("cpu"),
            surrogate=lambda: self.surrogate,
            statistics=lambda client: Statistics(
                torch.bincount(self.batches[client][1], minlength=10) / size
            ),
            oracles={name: grants[name] for name in oracles},
            num_examples=dict.fromkeys(truth, size),
        )
        return told

    def psnr(self, found) -> Tensor:
        """Return the PSNR of every true image, matched within its view, ``[V, B]``."""
        return torch.stack(
            [
                matched_psnr(images, found.examples[found.views == i])
                for i, (images, _) in enumerate(self.batches)
            ]
        )

    def floor(self) -> Tensor:
        """Return the PSNR of the mean surrogate image, ``[V, B]``."""
        return torch.stack([floor_psnr(images, self.surrogate) for images, _ in self.batches])


def distinct(split: Split, size: int, seed: int, dtype: torch.dtype = torch.float32):
    """Return random images of ``size`` different classes, and their labels."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    first = {int(split.labels[i]): i for i in reversed(order.tolist())}
    chosen = sorted(first.values(), key=order.tolist().index)[:size]
    return split.batch(torch.tensor(chosen), dtype)


def cifar_captures(expression: str, size: int, count: int, steps: int) -> Captured:
    """Return captures of real pictures under a network trained on 5,000 others."""
    return Captured.of(
        Honest(expression, CIFAR), cifar10(), size, count, steps=steps, surrogate=5000
    )
