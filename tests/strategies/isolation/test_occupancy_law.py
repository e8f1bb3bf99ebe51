"""How many images of a batch are alone in their bin, and that exactly those come back.

Real photograph tiles, the real local training in float32, cut-offs from the pool's own empirical
distribution: the expected share is ``(1 - 1/n)^(B-1)``.
"""

import pytest
import torch

from clients.trainer import FedSGD
from strategies.attacks.analytic.isolation.robbing_the_fed import RobbingTheFed
from tests.strategies.isolation.one_client import (
    Range,
    alone_in_bin,
    best_psnr,
    dense_cutoffs,
    pixels,
)


@pytest.mark.parametrize(
    ("units", "batch", "batches"), [(64, 16, 60), (256, 16, 60), (256, 64, 25), (1000, 64, 15)]
)
def test_exactly_the_images_that_are_alone_come_back(units: int, batch: int, batches: int) -> None:
    range_ = Range(RobbingTheFed(units=units), FedSGD(batch_size=batch))
    sent, shares = range_.craft(), []
    for seed in range(batches):
        private = range_.batch(batch, seed)
        view = range_.answer(sent, private, seed)
        found = range_.attack.reconstruct([view], range_.knowledge(batch))
        truth = pixels(private)
        alone = alone_in_bin(truth, dense_cutoffs(view))
        back = best_psnr(truth, found.examples) >= 60
        assert torch.equal(back, alone)
        assert len(found.examples) <= batch
        shares.append(float(back.double().mean()))
    law = (1 - 1 / units) ** (batch - 1)
    assert sum(shares) / batches == pytest.approx(law, abs=0.03)
