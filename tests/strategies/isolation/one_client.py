"""A pool of real photograph tiles, and one honest client's upload, by the real local training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from skimage import data as photographs
from torch import Tensor

from fedsim import seeds
from fedsim.attack import Manipulation, ModelToSend, Reconstruction
from fedsim.data import DataSpec, Split
from fedsim.defense import ClientContext, Defense
from fedsim.local import Local, LocalData
from fedsim.models import build_model, initial_model, load_arrays, travelling
from fedsim.threat import Knowledge
from fedsim.view import ServerView

PHOTOGRAPHS = (
    photographs.astronaut,
    photographs.chelsea,
    photographs.coffee,
    photographs.rocket,
    photographs.hubble_deep_field,
    photographs.immunohistochemistry,
)
SPEC = DataSpec((3, 32, 32), len(PHOTOGRAPHS), (0.45, 0.4, 0.35), (0.26, 0.25, 0.25))


@cache
def tiles() -> Split:
    """Tiles 32 x 32 cut every 11 pixels from photographs, no two equally bright."""
    parts, labels = [], []
    for label, load in enumerate(PHOTOGRAPHS):
        photograph = torch.from_numpy(load().copy()).permute(2, 0, 1)
        cut = photograph.unfold(1, 32, 11).unfold(2, 32, 11).permute(1, 2, 0, 3, 4)
        parts.append(cut.reshape(-1, 3, 32, 32)[:2500])
        labels.append(torch.full((len(parts[-1]),), label))
    images = torch.cat(parts)
    total = images.flatten(1).long().sum(dim=1)
    order = total.argsort()
    first = torch.ones(len(total), dtype=torch.bool)
    first[order[1:]] = total[order[1:]] != total[order[:-1]]
    return Split(images[first], torch.cat(labels)[first])


@dataclass(frozen=True)
class Range:
    """One attack against one honest client, without the federation around them."""

    attack: Manipulation
    local: Local
    body: str = "mlp(hidden=[])"
    dtype: torch.dtype = torch.float32
    threat_model: str = "G"
    defenses: tuple[Defense, ...] = ()
    spec: DataSpec = SPEC
    private: Callable[[], Split] = tiles
    surrogate: Callable[[], Split] = tiles

    def knowledge(self, examples: int | None = None) -> Knowledge:
        return Knowledge(
            self.threat_model,
            data=self.spec,
            training=self.local.details(),
            seed=1,
            device=torch.device("cpu"),
            surrogate=self.surrogate,
            num_examples={"round-1-client-0": examples},
        )

    def craft(self, seed: int = 0) -> ModelToSend:
        arrays = travelling(initial_model(self.body, self.spec, seed).to(self.dtype))
        return self.attack.craft(self.body, arrays, self.knowledge())

    def batch(self, size: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.private()), generator=generator)
        return self.private().subset(order[:size])

    def answer(self, sent: ModelToSend, private: Split, seed: int = 0) -> ServerView:
        """Train as an honest client does on the model it was sent; return what the server gets."""
        model = build_model(sent.expression, self.spec).to(self.dtype).eval()
        load_arrays(model, sent.arrays)
        plan = self.local.plan(len(private), 1)
        ctx = ClientContext(
            client=0,
            round=1,
            plan=plan,
            public=lambda *names: seeds.generator(seed, *names),
            secret=lambda *names: torch.Generator().manual_seed(seeds.derive(seed + 1, *names)),
        )
        data = LocalData(private, torch.device("cpu"), self.dtype)
        upload = self.local.train(model, data, self.defenses, ctx).upload
        received = {name: tensor.detach().clone() for name, tensor in upload.items()}
        return ServerView(1, (0,), sent.expression, sent.arrays, received, self.local.kind)

    def run(self, size: int, seed: int = 0) -> tuple[Tensor, Reconstruction, ServerView]:
        """Return the private images ``[size, 3, 32, 32]``, what was found, and the view."""
        private = self.batch(size, seed)
        view = self.answer(self.craft(seed), private, seed)
        found = self.attack.reconstruct([view], self.knowledge(size))
        return pixels(private), found, view


def pixels(split: Split) -> Tensor:
    return split.batch(torch.arange(len(split)), torch.float64)[0]


def best_psnr(truth: Tensor, candidates: Tensor) -> Tensor:
    """For each true image ``[B, ...]``: PSNR in dB of the candidate nearest to it."""
    if not len(candidates):
        return torch.zeros(len(truth))
    # Not by |a|^2 - 2ab + |b|^2: above 60 dB that difference has no digits left.
    flat = candidates.double().flatten(1)
    mse = torch.stack([(flat - one).square().mean(dim=1).min() for one in truth.flatten(1)])
    return -10 * mse.clamp_min(1e-15).log10()


def alone_in_bin(truth: Tensor, cutoffs: Tensor) -> Tensor:
    """Say of each image whether no other one has its brightness between the same cut-offs."""
    bins = torch.bucketize(truth.flatten(1).mean(dim=1), cutoffs)
    return (bins.unsqueeze(0) == bins.unsqueeze(1)).sum(dim=1) == 1


def dense_cutoffs(view: ServerView) -> Tensor:
    """Read the cut-offs of the mean brightness off a dense imprint, ``[n]``."""
    rows = view.sent["imprint.weight"].double().sum(dim=1)
    return -view.sent["imprint.bias"].double() / rows
