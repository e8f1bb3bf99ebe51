"""LOKI's published share on CIFAR-10, through the whole federation, where its images are at hand.

Ten clients of 64 images, eight local steps of 8, 256 bins, cut-offs from a normal distribution
fitted to other images, as in the authors' demonstration (there CSF 500 and 87.5 % of units).
``FEDSIM_TEST_DATA`` names a folder that holds ``cifar10/train_1.npz`` and ``cifar10/test_1.npz``.
"""

from pathlib import Path

import pytest
import torch

from fedsim import adversary, reconstructions
from fedsim.data import DataSet
from strategies.attacks.analytic.isolation.loki import sent_cutoffs
from tests.fedsim.small import Ran, federated, plug_in
from tests.strategies.isolation import test_published_figures as published
from tests.strategies.isolation.one_client import alone_in_bin, best_psnr

pytestmark = [published.pytestmark, pytest.mark.slow]
CLIENTS, IMAGES = 10, 64
READ_OUT = 30.0  # as for Robbing the Fed: at 20 dB a mixture that one image dominates counts too


def ran(folder: Path, attack: str, steps: int = 8) -> Ran:
    return federated(
        folder,
        {
            "threat-model": "G",
            "attack": attack,
            "channel": "trusted-sum",
            "data.dataset": "cifar-part",
            "model.name": "convnet(width=8)",
            "federation.clients": CLIENTS,
            "federation.local": f"fedavg(epochs=1, batch_size={IMAGES // steps}, lr=1e-4)",
        },
    )


def share_read(run: Ran, decibel: float) -> float:
    """Return the share of all clients' images that some candidate shows at so many dB."""
    (path,) = (run.folder.path / "reconstructions").glob("*.safetensors")
    found, _ = reconstructions.load(path)
    records = [run.vault.record(client, 1) for client in range(CLIENTS)]
    truth = torch.cat([record.examples for record in records if record]).double()
    return float((best_psnr(truth, found.examples) >= decibel).double().mean())


def share_alone(run: Ran) -> float:
    """Return the share of images that have a bin to themselves at their client."""
    cutoffs, alone = sent_cutoffs(run.views[0]), []
    for client in range(CLIENTS):
        record = run.vault.record(client, 1)
        assert record is not None
        alone.append(alone_in_bin(record.examples.double(), cutoffs))
    return float(torch.cat(alone).double().mean())


def calibrated_scale(run: Ran) -> float:
    return float(run.views[0].sent["conv.weight"].max())


@pytest.fixture(autouse=True)
def _part(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = published.part("train_1"), published.part("test_1")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(2))
    held = DataSet(train.subset(order[: CLIENTS * IMAGES]), test, tuple("0123456789"))
    plug_in(monkeypatch, "dataset", "cifar-part", lambda: held)
    monkeypatch.setattr(adversary, "split_test", lambda *_: (test, test))


def test_the_share_with_push_out_and_without_and_with_no_scale_at_all(tmp_path: Path) -> None:
    pushing = ran(tmp_path / "push", "loki")
    scale = calibrated_scale(pushing)
    # A unit moves as the scale's square: here one image moves it by a tenth of its bin.
    images_norm, bins = 870.0, 0.1
    gentle = (bins * scale / (0.5 * images_norm)) ** 0.5
    runs = {
        "push-out": pushing,
        "no push-out": ran(tmp_path / "gentle", f"loki(scale={gentle})"),
        "scale 1": ran(tmp_path / "one", "loki(scale=1.0)"),
    }
    shares = {name: share_read(run, READ_OUT) for name, run in runs.items()}
    loose = {name: share_read(run, 20.0) for name, run in runs.items()}
    alone = share_alone(pushing)
    print(f"alone in a bin {alone:.3f}; calibrated scale {scale:.3g}, gentle {gentle:.3g}")
    print(f"at {READ_OUT:g} dB {shares}; at 20 dB {loose}")
    assert abs(shares["no push-out"] - alone) <= 0.03
    assert 0.83 <= shares["push-out"] <= 0.90
    assert 0.70 <= shares["no push-out"] <= 0.82
    assert shares["scale 1"] <= 0.05
