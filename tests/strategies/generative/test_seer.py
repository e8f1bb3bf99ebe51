"""SEER: what is read is exact, chance follows its closed form, and a decoded image is the one."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clients.defenses.detection.d_snr import d_snr
from clients.trainer import FedSGD
from fedsim import reconstructions
from fedsim.data import DataSet, DataSpec, Split, load_dataset
from fedsim.errors import ScenarioError
from fedsim.models import build_model, initial_model, load_arrays, travelling
from fedsim.threat import Knowledge
from strategies.attacks.generative.carrier import Carrier, see
from strategies.attacks.generative.decoder import fit_decoder
from strategies.attacks.generative.normal import NormalEquations
from strategies.attacks.generative.properties import exactly_one, fit_threshold, standardized
from strategies.attacks.generative.rounds import SurrogateRounds
from strategies.attacks.generative.seer import training_loss
from tests.fedsim.small import Ran, federated, plain_gradient, plug_in

FOLDER = Path(os.environ.get("FEDSIM_TEST_DATA", "/nowhere")) / "cifar10"
with_cifar = pytest.mark.skipif(
    not (FOLDER / "train_1.npz").exists(),
    reason="FEDSIM_TEST_DATA names no folder that holds cifar10/train_1.npz",
)
DIGITS = "convnet(width=8, norm='batch', hidden=[8])"
SMALL = {
    "threat-model": "G",
    "attack": "seer(steps=2, refit=20, augment=False)",
    "model.name": DIGITS,
    "model.batchnorm": "private",
    "federation.local": "fedsgd(batch_size=8, lr=0.1)",
}


@cache
def part(name: str) -> Split:
    with np.load(FOLDER / f"{name}.npz") as stored:
        return Split(torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]).long())


CIFAR: dict[str, Any] = {
    "data.dataset": "cifar-parts",
    "model.name": "convnet(width=16, stride=2, norm='batch', hidden=[16])",
    "federation.clients": 128,
    "federation.local": "fedsgd(batch_size=16, lr=0.1)",
}


def knowledge(surrogate: Split, size: int, spec: DataSpec) -> Knowledge:
    return Knowledge(
        "G",
        data=spec,
        training=FedSGD(batch_size=size, lr=0.1).details(),
        seed=3,
        device=torch.device("cpu"),
        batchnorm="private",
        surrogate=lambda: surrogate,
    )


def seeing(taus: Tensor) -> tuple[Carrier, SurrogateRounds]:
    carrier = Carrier(initial_model(DIGITS, load_dataset("digits").spec, 0).double())
    data = load_dataset("digits")
    told = knowledge(data.test, 8, data.spec)
    rounds = SurrogateRounds(told, "test", "bright", torch.float64, augment=False)
    see(carrier, rounds, taus)
    return carrier, rounds


@pytest.mark.parametrize("examples", [8, 64, 500])
def test_exactly_one_of_independent_images(examples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    above = torch.rand(20_000, examples, generator=generator) < 1.5 / examples
    measured = float((above.sum(dim=1) == 1).double().mean())
    assert measured == pytest.approx(exactly_one(1.5 / examples, examples), abs=0.015)
    shares = torch.linspace(1e-4, 0.999, 4000, dtype=torch.float64)
    best = float(shares[exactly_one(shares, examples).argmax()])  # type: ignore[arg-type,attr-defined]
    assert best == pytest.approx(1 / examples, abs=1e-3)
    assert exactly_one(1 / examples, examples) == pytest.approx(np.exp(-1), abs=0.5 / examples)


@pytest.mark.parametrize("clients", [1, 4])
def test_the_threshold_keeps_its_promise(clients: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = standardized(torch.randn(4000, 16, generator=generator))
    threshold = fit_threshold(scores[:1000], clients)
    above = (scores[1000:] > threshold.tau).sum(dim=1).view(-1, clients).sum(dim=1)
    measured = float((above == 1).double().mean())
    assert measured == pytest.approx(threshold.exactly_one, abs=0.06)
    assert measured > exactly_one(1 / (16 * clients), 16 * clients)  # standardizing helps


@with_cifar
@pytest.mark.parametrize(
    ("clients", "size", "share"), [(1, 64, 0.46), (4, 64, 0.40), (8, 32, 0.41)]
)
def test_brightness_of_cifar_batches(clients: int, size: int, share: float) -> None:
    bright = part("train_1").images.float().mean(dim=(1, 2, 3))
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randperm(len(bright), generator=generator)[:size] for _ in range(6000)]
    scores = standardized(bright[torch.stack(draws)])
    tau = fit_threshold(scores[:1000], clients).tau
    whole = scores[: len(scores) // clients * clients] > tau
    above = whole.sum(dim=1).view(-1, clients).sum(dim=1)
    assert float((above == 1).double().mean()) == pytest.approx(share, abs=0.05)


def test_what_is_read_is_the_sum_of_weighted_gradients() -> None:
    images, labels = load_dataset("digits").train.batch(torch.arange(8), torch.float64)
    carrier = Carrier(initial_model(DIGITS, load_dataset("digits").spec, 0).double())
    ones = torch.ones(1, 8, dtype=torch.float64)
    (read,) = carrier.read(images, labels, ones, train=False)
    whole = plain_gradient(carrier.model, images, labels)
    assert torch.allclose(read, 8 * carrier.read_update(whole), atol=1e-12)
    each = carrier.read(images, labels, torch.eye(8, dtype=torch.float64), train=False)
    assert torch.allclose(each.sum(dim=0), read, atol=1e-12)


def test_what_a_protocol_returns_in_float64_is_read_in_the_networks_type() -> None:
    carrier = Carrier(initial_model(DIGITS, load_dataset("digits").spec, 0))
    back = {name: p.detach().double() for name, p in carrier.model.named_parameters()}
    assert carrier.read_update(back).dtype == torch.float32


def test_a_unit_that_one_image_fires_holds_that_image() -> None:
    """The row's gradient over the bias's is its features; mostly it has the property."""
    carrier, rounds = seeing(torch.full((4,), 1.2))
    decoder, _ = fit_decoder(carrier, rounds, 1, 100)
    found = []
    for _ in range(60):
        batch = rounds.draw()
        features = carrier.features(batch.images)
        fired = (carrier.layer(features)[:, 0] > 0).nonzero().flatten()
        ones = torch.ones(1, 8, dtype=torch.float64)
        (read,) = carrier.read(batch.images, batch.labels, ones, train=False)
        if len(fired) != 1 or int(batch.labels[fired]) == rounds.rarest_class:
            continue
        row = read[0, :-1] / read[0, -1]
        assert torch.allclose(row, features[fired[0]], rtol=1e-6)
        found.append(int(fired) == int(batch.scores.argmax()))
    assert len(found) > 10
    assert sum(found) > 0.7 * len(found)  # the score is estimated from features
    assert decoder.signal(torch.zeros(1, *read.shape, dtype=torch.float64)).abs().max() == 0


def test_normal_equations_are_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64) + 3
    y = x @ torch.randn(5, 2, generator=generator, dtype=torch.float64) - 1
    fitted = NormalEquations()
    for start in range(0, 200, 33):
        fitted.add(x[start : start + 33], y[start : start + 33])
    assert torch.allclose(fitted.target + (x - fitted.mean) @ fitted.solve(1e-12), y, atol=1e-8)


def test_the_loss_in_closed_form() -> None:
    said = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 5.0]])
    base, image = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 3.0])
    # pos = ((3+1-3)^2 + (5-3)^2) / 2, neg = (1+1)/2 + (4+0)/2
    assert float(training_loss(said, base, image, 3.0)) == pytest.approx((2.5 + 3 * 3) / 4)
    assert float(training_loss(said, base, None, 3.0)) == pytest.approx(3 * 3 / 4)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"federation.local": "fedavg(epochs=1, batch_size=8)"}, "fedsgd"),
        ({"model.name": "convnet(hidden=[8])"}, "BatchNorm"),
        ({"model.name": "convnet(norm='batch')"}, "two linear layers"),
        ({"model.batchnorm": "frozen"}, "frozen statistics"),
        ({"attack": "seer(property='red')"}, "color"),
        ({"attack": "seer(clients=4)"}, "mode='thresh'"),
        ({"channel": "trusted-sum"}, "write clients="),
        ({"threat-model": "F"}, "surrogate"),
        ({"federation.local": "fedsgd(batch_size=1, lr=0.1)"}, "2 or more"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError, match=told):
        federated(tmp_path, {**SMALL, **changes})


def test_later_rounds_send_the_network_of_the_first(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**SMALL, "federation.clients": 2, "federation.rounds": 2})
    assert ran.failures == []
    first, later = ran.views[0].sent, ran.views[-1].sent
    assert all(torch.equal(first[name], later[name]) for name in first)


def test_the_honest_start_trains_any_network(tmp_path: Path) -> None:
    changes = {
        "model.name": "resnet20(width=4)",
        "attack": "seer(start='honest', steps=2, refit=20, augment=False)",
        "federation.clients": 2,
    }
    ran = federated(tmp_path, {**SMALL, **changes})
    honest = travelling(ran.parts.model())
    assert ran.failures == []
    assert any(not torch.equal(honest[name], ran.views[0].sent[name]) for name in honest)


@dataclass(frozen=True)
class Decoded:
    """Of each view: its batch ``[V, B, C, H, W]`` and labels, and what was decoded."""

    ran: Ran
    images: Tensor
    labels: Tensor
    candidates: Tensor

    @property
    def positive(self) -> Tensor:
        scores = self.images.mean(dim=(2, 3, 4))
        return self.images[torch.arange(len(self.images)), scores.argmax(dim=1)]

    def psnr(self, guess: Tensor) -> Tensor:
        mse = (guess - self.positive).square().flatten(1).mean(dim=1)
        return -10 * mse.log10()

    def network(self) -> nn.Module:
        view = self.ran.views[0]
        model = build_model(view.model, self.ran.parts.spec)
        load_arrays(model, view.sent)
        return model.train()

    def detected(self) -> list[float]:
        return [
            d_snr(self.network(), batch) for batch in zip(self.images, self.labels, strict=True)
        ]

    def same_decoder_on(self, model: nn.Module, surrogate: Split) -> Tensor:
        """What the sent network's decoder makes of another network's gradients."""
        told = knowledge(surrogate, self.images.shape[1], self.ran.parts.spec)
        rounds = SurrogateRounds(told, "decode", "bright", torch.float32, augment=True)
        decoder, _ = fit_decoder(Carrier(self.network()), rounds, 1, 400)
        carrier, ones = Carrier(model), torch.ones(1, self.images.shape[1])
        reads = [
            carrier.read(images, labels, ones, train=False)[0]
            for images, labels in zip(self.images, self.labels, strict=True)
        ]
        return decoder(torch.stack(reads)).detach().clamp(0, 1).view_as(self.positive)


def decoded(folder: Path, changes: dict[str, Any]) -> Decoded:
    ran = federated(folder, {**SMALL, **changes})
    assert ran.failures == []
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    records = [ran.vault.record(view.senders[0], view.round) for view in ran.views]
    images = torch.stack([record.examples.float() for record in records if record])
    labels = torch.stack([record.labels for record in records if record])
    return Decoded(ran, images, labels, reconstructions.load(path)[0].examples)


@with_cifar
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_cifar_batches_of_16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 dB above the mean image and above the same decoder with a random network; D-SNR below 1."""
    data = DataSet(part("train_1"), part("test_1"), tuple("0123456789"))
    plug_in(monkeypatch, "dataset", "cifar-parts", lambda: data)
    found = decoded(tmp_path / "seer", {**CIFAR, "attack": "seer"})
    start = decoded(tmp_path / "start", {**CIFAR, "attack": "seer(steps=0)"})
    honest = decoded(tmp_path / "honest", {**CIFAR, "attack": "seer(start='honest', steps=0)"})
    ours = found.psnr(found.candidates)
    mean = found.psnr(data.test.batch(torch.arange(len(data.test)))[0].mean(dim=0))
    same = found.psnr(found.same_decoder_on(honest.network(), data.test))
    detected = found.detected()
    print(f"\npositive {ours.mean():.2f} dB, median {ours.median():.2f}, best {ours.max():.2f}")
    print(f"above 18 dB {(ours > 18).float().mean():.2f}; mean image {mean.mean():.2f} dB")
    print(f"same decoder, random network {same.mean():.2f} dB")
    print(f"decoder fitted to a random network {honest.psnr(honest.candidates).mean():.2f} dB")
    print(
        f"start {start.psnr(start.candidates).mean():.2f} dB, D-SNR {np.mean(start.detected()):.2f}"
    )
    print(f"D-SNR mean {np.mean(detected):.2f}, largest {max(detected):.2f}")
    assert ours.mean() > mean.mean() + 5
    assert ours.mean() > same.mean() + 5
    assert np.mean(detected) < 1
