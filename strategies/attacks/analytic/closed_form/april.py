"""APRIL: read an image off a transformer's first attention and its position embedding.

Lu, Zhang, Zhao, He and Cheng, "APRIL: Finding the Achilles' Heel on Privacy for Vision
Transformers", CVPR 2022: its closed form, on structure (A) of Fig. 1.  The tokens ``z = E x + p``
``[T, D]`` carry a trainable position embedding p, so that ``A = dL/dz`` is what is observed as p's
gradient.  Where z goes into the first attention's queries, keys and values and nowhere else,

    ``A^T z = W_q^T dL/dW_q + W_k^T dL/dW_k + W_v^T dL/dW_v``

for one example: linear equations for z, ``[D, T] [T, D] = [D, D]``.  Less p and the embedding's
bias, z is the patches times E, which is inverted in turn.  A rescaled update changes nothing.

When it is exact: no skip connection and no LayerNorm around that attention; as many independent
rows in A as there are tokens, which a network of one block that reads its class token does not have
(rank at most ``2 heads + 1``); and ``T <= D``, ``C patch^2 <= D``.  A is badly conditioned (1e9):
rounding leaves its whole rank in float64, and a dozen directions in float32.  Where rank is missing
the smallest solution is taken, which still shows the image, blurred (``paper.measured``).

The paper's other attack, by optimization with a term for the position embedding's gradient, works
on any transformer and is not this one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedsim.attack import Attack, Cost, Paper, Reconstruction, Setting, ToyCase
from fedsim.models.vit import ViT
from fedsim.registry import register
from fedsim.threat import Capability, Knowledge
from fedsim.view import ServerView
from strategies.attacks.labels.idlg import negative_class

FIRST = "blocks.0.attention"


@register("attack", "april")
@dataclass(frozen=True, kw_only=True)
class APRIL(Attack):
    """Two least-squares problems in float64.

    Threat model B: it knows that an update is of one example, and leaves out views of more.  Cost:
    milliseconds, and one gradient for the score: the cosine of the candidate's gradient and the
    observed.  The label is the class whose logit gradient is negative.

    It is exact for clients that compute in float64 (``federation.precision``), blurred in float32,
    and wants a ``vit`` whose first block is plain.

    Parameters
    ----------
    precision : float or None
        Relative error of the update, below which a direction of A is noise; None is the rounding
        of its floating-point type.
    """

    paper = Paper(
        title="APRIL: Finding the Achilles' Heel on Privacy for Vision Transformers",
        authors="Jiahao Lu, Xi Sheryl Zhang, Tianli Zhao, Xiangyu He, Jian Cheng",
        venue="CVPR",
        year=2022,
        published="ViT, ImageNet, one image: 23.9 dB, LPIPS 0.12, in a re-run in Geiping's "
        "breaching on a ViT with its first block changed as here",
        measured="vit (untrained, 65 tokens, width 96), CIFAR-10, one image, the first twenty: "
        "float64 132 dB at least, median 150; float32 22.3, median 24.6; one block (rank 7 of 65) "
        "17.8, median 20.8; labels right (FEDSIM_TEST_DATA=... python -m pytest -m slow -s "
        "tests/strategies/passive/test_april.py)",
    )
    needs = frozenset({Capability.UPDATES, Capability.BASICS})
    unit = "views"
    toy = ToyCase(
        scenario={
            "threat-model": "B",
            "attack": "april",
            "data.dataset": "photo-tiles",
            "model.name": "vit",
            "federation.clients": 2,
            "federation.local": "fedsgd(batch_size=1, lr=0.1)",
            "federation.precision": "float64",
        },
        # Seeds 1, 2, 3, 7 and 11 gave 149.4, 137.6, 134.4, 127.9 and 151.2.
        figure="leak.psnr.mean",
        low=105.0,
        high=185.0,
    )

    precision: Annotated[float, Field(gt=0, lt=1)] | None = None

    def check(self, model: nn.Module, kind: str) -> None:  # noqa: ARG002
        """Refuse networks whose equations do not hold or are too few."""
        if not isinstance(model, ViT) or not model.blocks[0].plain:
            raise ValueError(
                "april's equation holds where the tokens go into the first attention and nowhere "
                "else; use the model vit(first='plain'), or inverting-gradients"
            )
        tokens, width = model.position.shape
        pixels = model.embed.in_features
        if tokens > width or pixels > width:
            raise ValueError(
                f"{tokens} tokens and {pixels} values in a patch are to be read from tokens "
                f"{width} wide; let width be at least {max(tokens, pixels)}"
            )

    def check_setting(self, setting: Setting) -> None:
        """Refuse updates that are not of one example and one step."""
        together = setting.cohort if setting.channel.aggregates else 1
        examples = sum(setting.uploads[:together])
        epochs = setting.training.epochs if setting.training.kind == "weights" else 1
        if examples > 1 or epochs > 1:
            raise ValueError(
                f"april inverts one step on one example, and an update is of {examples} examples "
                f"and {epochs} passes over them; use federation.local = 'fedsgd(batch_size=1)' and "
                "the channel 'plain', or an attack for batches (inverting-gradients)"
            )

    def reconstruct(self, views: Sequence[ServerView], knowledge: Knowledge) -> Reconstruction:
        """Return ``[M, C, H, W]`` in ``[0, 1]``, float64, at most one candidate for each view."""
        shape = knowledge.basics.data.shape
        examples, indices, labels, scores, receipts = [], [], [], [], []
        for index, view in enumerate(views):
            knowledge.progress(index + 1, len(views), "")
            if (count := knowledge.num_examples(view)) != 1:
                receipts.append(f"{view.label}: left out, it is of {count} examples")
                continue
            model = knowledge.model(view).double().cpu()
            assert isinstance(model, ViT)
            update = {name: t.cpu().double() for name, t in view.update().items()}
            if not all(t.isfinite().all() and t.any() for t in update.values()):
                receipts.append(f"{view.label}: left out, an array of it is zero or not finite")
                continue
            rounding = torch.finfo(view.received["position"].dtype).eps
            tokens, rank = solve_tokens(model, update, self.precision or rounding)
            image = embedded_image(model, tokens, shape).clamp(0, 1)
            label = negative_class(view, model)
            receipts.append(f"{view.label}: rank {rank} for {len(tokens)} tokens")
            examples.append(image)
            indices.append(index)
            labels.append(label)
            scores.append(_cosine(model, image, label, update))
        return Reconstruction(
            examples=torch.stack(examples) if examples else torch.empty(0, *shape),
            views=torch.tensor(indices, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float64),
            cost=Cost(gradient_evaluations=len(examples)),
            receipts=tuple(receipts),
        )


def solve_tokens(model: ViT, update: dict[str, Tensor], precision: float) -> tuple[Tensor, int]:
    """Return z ``[T, D]``, what the first block read, and the rank of A; float64, on the CPU.

    Singular values of A that are rounding (``precision``, relative) are taken to be zero.
    """
    first = update["position"]  # A
    right = torch.zeros(first.shape[1], first.shape[1], dtype=first.dtype)
    for part in ("query", "key", "value"):
        name = f"{FIRST}.{part}.weight"
        right += model.get_parameter(name).detach().T @ update[name]
    cutoff = precision * max(first.shape)  # as usual in numerical linear algebra
    least = torch.linalg.lstsq(first.T, right, rcond=cutoff, driver="gelsd")
    return least.solution, int(least.rank)


def embedded_image(model: ViT, tokens: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the image ``[C, H, W]`` whose patches were embedded in tokens ``[T, D]``."""
    embedded = (tokens - model.position)[1:] - model.embed.bias  # without the class token
    patches = torch.linalg.lstsq(model.embed.weight, embedded.T).solution  # [C p p, T - 1]
    whole = (model.grid[0] * model.patch, model.grid[1] * model.patch)
    image = functional.fold(patches.detach(), whole, model.patch, stride=model.patch)
    return image[:, : shape[1], : shape[2]]


def _cosine(model: nn.Module, image: Tensor, label: int, update: dict[str, Tensor]) -> float:
    """Return the cosine of the gradient that a candidate has and the observed one."""
    loss = functional.cross_entropy(model(image.unsqueeze(0)), torch.tensor([label]))
    parameters = dict(model.named_parameters())
    gradient = torch.autograd.grad(loss, list(parameters.values()))
    own = torch.cat([g.flatten() for g in gradient])
    observed = torch.cat([update[name].flatten() for name in parameters])
    return float(functional.cosine_similarity(own, observed, dim=0))
