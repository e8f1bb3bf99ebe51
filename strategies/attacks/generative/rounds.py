"""Rounds of clients that the server plays through with surrogate data, over and over."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.threat import Knowledge
from strategies.attacks.generative.properties import PROPERTIES, standardized


@dataclass(frozen=True)
class Batch:
    """One client's surrogate batch: ``[B, C, H, W]`` in ``[0, 1]``, ``[B]``, ``[B]``.

    ``scores`` are the property's, standardized within the batch.
    """

    images: Tensor
    labels: Tensor
    scores: Tensor

    def sums(self, positive: int | None, generator: torch.Generator) -> Tensor:
        """Return the weights ``[3, B]`` of the sums that theta is trained on.

        A random mix of the others, of length one; all others over the root of their number; the
        positive alone (nothing, where there is none).
        """
        chosen = torch.zeros_like(self.scores)
        if positive is not None:
            chosen[positive] = 1
        mix = torch.randn(chosen.shape, generator=generator).to(chosen) * (1 - chosen)
        rest = 1 - chosen
        return torch.stack([mix / mix.norm(), rest / rest.norm(), chosen])


class SurrogateRounds:
    """Draws batches as a client's would be.

    With ``augment`` images are flipped, and square ones turned by quarters, at random: the authors'
    augmentation without its color jitter, which would change what a bright image is.

    Parameters
    ----------
    knowledge : Knowledge
    purpose : str
        Names the random stream.
    score : str
        The property.
    dtype : torch.dtype
        Of images.
    """

    def __init__(
        self, knowledge: Knowledge, purpose: str, score: str, dtype: torch.dtype, *, augment: bool
    ) -> None:
        self.score, self.dtype, self.augment = PROPERTIES[score], dtype, augment
        self.surrogate, self.device = knowledge.surrogate, knowledge.device
        self.generator = knowledge.generator("seer", purpose)
        self.size = min(knowledge.training.batch_size, len(self.surrogate))

    def draw(self) -> Batch:
        """Draw one batch."""
        chosen = torch.randperm(len(self.surrogate), generator=self.generator)[: self.size]
        images, labels = self.surrogate.batch(chosen, self.dtype)
        if self.augment:
            images = self._augmented(images)
        scores = standardized(self.score(images))
        return Batch(images.to(self.device), labels.to(self.device), scores.to(self.device))

    def scores(self, batches: int) -> Tensor:
        """Return standardized scores of so many batches, ``[batches, B]``, on the CPU."""
        return torch.stack([self.draw().scores.cpu() for _ in range(batches)])

    @property
    def rarest_class(self) -> int:
        """The class of the fewest surrogate examples, at least one."""
        counts = torch.bincount(self.surrogate.labels)
        return int(torch.where(counts > 0, counts, counts.sum() + 1).argmin())

    def _augmented(self, images: Tensor) -> Tensor:
        """Return images ``[N, C, H, W]``, each flipped or not, and turned where they are square."""
        ways = 8 if images.shape[-1] == images.shape[-2] else 2
        way = torch.randint(ways, (len(images),), generator=self.generator)
        changed = images.clone()
        for one in range(1, ways):
            turned = images[way == one].rot90(one // 2 if ways == 8 else 0, (-2, -1))
            changed[way == one] = turned.flip(-1) if one % 2 else turned
        return changed
