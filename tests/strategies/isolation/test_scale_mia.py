"""Scale-MIA: codes are isolated exactly, and show as well as the auto-encoder does."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import adversary, reconstructions
from fedsim.data import DataSet, Split
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.models import initial_model
from fedsim.scenario import Scenario
from fedsim.threat import Knowledge
from strategies.attacks.analytic.isolation import auto_encoder
from strategies.attacks.analytic.isolation.scale_mia import ScaleMIA, parted, read_codes
from tests.fedsim.small import DEFAULTS, federated, plug_in
from tests.strategies.isolation.test_published_figures import FOLDER, part

FEW = {
    "threat-model": "G",
    "attack": "scale-mia(epochs=2)",
    "data.dataset": "photo-tiles",
    "model.name": "cnn(hidden=[256, 32])",
    "federation.clients": 2,
    "federation.local": "fedsgd(batch_size=8, lr=0.1)",
}


class Honest(ScaleMIA):
    """Sends what it was given."""

    def craft(self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge) -> Any:
        crafted = super().craft(expression, arrays, knowledge)
        return type(crafted)(expression, arrays)


def codes_of(folder: Path, changes: dict[str, Any] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the true codes ``[M, D]`` of all views, which are alone in a bin, and those read."""
    ran = federated(folder, {**FEW, **(changes or {})})
    assert ran.failures == []
    truth, alone, read = [], [], []
    for view in ran.views:
        knowledge = Knowledge(
            "G",
            data=ran.parts.spec,
            training=ran.parts.local.details(),
            seed=0,
            device=torch.device("cpu"),
        )
        parts = parted(knowledge.model(view).double())
        records = [ran.vault.record(client, view.round) for client in view.senders]
        images = torch.cat([record.examples.double() for record in records if record])
        with torch.no_grad():
            own = parts.encoder(images).flatten(1)
            bins = (parts.first(own) > 0).sum(dim=1)
        truth.append(own)
        alone.append((bins.unsqueeze(0) == bins.unsqueeze(1)).sum(dim=1) == 1)
        read.append(read_codes(view, parts)[0])
    return torch.cat(truth), torch.cat(alone), torch.cat(read)


def error(truth: Tensor, read: Tensor) -> Tensor:
    """Return for each code the distance to the nearest that was read, relative to its length."""
    return torch.cdist(truth, read).min(dim=1).values / truth.norm(dim=1)


def test_codes_that_are_alone_in_their_bin_are_read_and_no_others(tmp_path: Path) -> None:
    many = {"federation.precision": "float64", "federation.local": "fedsgd(batch_size=32)"}
    truth, alone, read = codes_of(tmp_path, many)
    assert 0 < alone.sum() < len(alone)
    assert torch.equal(error(truth, read) < 1e-6, alone)


@pytest.mark.parametrize(("epochs", "least"), [(1, 0.99), (2, 0.88), (8, 0.6)])
def test_later_local_epochs_cost_some_codes(epochs: int, least: float, tmp_path: Path) -> None:
    """The gain's first step pushes most units out of all images' reach; the rest move on."""
    truth, alone, read = codes_of(
        tmp_path,
        {
            "federation.clients": 64,
            "federation.fraction": 0.125,
            "federation.local": f"fedavg(epochs={epochs}, batch_size=100)",
        },
    )
    assert 0.8 <= alone.double().mean() <= 0.95  # eight clients of 35; (1 - 1/256)^34 = 0.875
    near = error(truth, read)[alone] < 0.02
    print(f"{epochs} epochs: {near.double().mean():.3f} of {len(near)} within 2 %")
    assert near.double().mean() >= least


def test_the_bins_of_a_sum_behind_secagg_are_read_like_those_of_one(tmp_path: Path) -> None:
    truth, alone, read = codes_of(
        tmp_path, {"channel": "secagg(max_weight=8)", "federation.clients": 4}
    )
    assert len(truth) == 32
    assert (error(truth, read)[alone] < 0.1).double().mean() >= 0.9


def test_the_decoder_is_made_anew_from_the_same_view_and_is_the_same(tmp_path: Path) -> None:
    ran = federated(tmp_path, FEW)
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    first, _ = reconstructions.load(path)
    assert ran.parts.attack is not None
    knowledge = adversary.build_knowledge(ran.parts, ran.folder, lambda *_: None)  # type: ignore[arg-type]
    again = ran.parts.attack.reconstruct(ran.views, knowledge)
    assert torch.allclose(first.examples, again.examples, atol=1e-5)


def test_later_rounds_send_what_the_first_one_sent(tmp_path: Path) -> None:
    ran = federated(tmp_path, {**FEW, "federation.rounds": 2})
    first, last = ran.views[0], ran.views[-1]
    assert (first.round, last.round) == (1, 2)
    assert all(torch.equal(first.sent[name], last.sent[name]) for name in first.sent)


def test_the_decoder_mirrors_any_size() -> None:
    for side in (8, 25, 32):
        shape = (3, side, side)
        encoder = torch.nn.Sequential(
            torch.nn.Conv2d(3, 12, 4, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(12, 5, 3, stride=2, padding=1),
            torch.nn.ReLU(),
        )
        decoder = auto_encoder.mirrored(encoder, shape, torch.Generator().manual_seed(0))
        assert decoder(encoder(torch.rand(2, *shape))).shape == (2, *shape)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.name": "convnet"}, "no plain sequence"),
        ({"model.name": "vgg16"}, "three linear layers|cannot mirror"),
        ({"model.name": "mlp(hidden=[64, 32])"}, "no convolution"),
        ({"model.name": "mlp"}, "three linear layers"),
        ({"threat-model": "F"}, "surrogate"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_trains(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ScenarioError, match=said):
        federated(tmp_path, {**FEW, **changes})
    assert not list(tmp_path.rglob("views"))


def test_a_view_of_other_parameters_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "attack", "honest-scale-mia", Honest)
    with pytest.raises(RunFailed, match="without bins"):
        federated(tmp_path, {**FEW, "attack": "honest-scale-mia(epochs=1)"})


# -- the published shares on CIFAR-10 --------------------------------------------------------------
@cache
def clients_and_surrogate() -> DataSet:
    """Clients hold test images; the server 5,000 others, a tenth of the authors' 50,000."""
    return DataSet(part("test_1"), part("train_1"), tuple("0123456789"))


cifar = pytest.mark.skipif(
    not (FOLDER / "train_1.npz").exists(),
    reason="FEDSIM_TEST_DATA names no folder that holds cifar10/train_1.npz",
)


@cifar
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_kinds_of_cutoffs_share_out_unseen_codes_by_the_law() -> None:
    seen, unseen = (
        part("train_1").subset(torch.arange(*ends)) for ends in ((5000,), (5000, 10000))
    )
    model = initial_model("cnn", clients_and_surrogate().spec, 0)
    encoder, cpu = parted(model).encoder, torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    decoder = auto_encoder.mirrored(encoder, (3, 32, 32), generator)
    auto_encoder.train(
        encoder, decoder, seen, epochs=12, generator=generator, device=cpu, tell=lambda *_: None
    )
    own, other = (auto_encoder.encoded(encoder, split, cpu).flatten(1) for split in (seen, unseen))
    for bins in ("empirical", "normal"):
        cutoffs = ScaleMIA(bins=bins).cutoffs(own.double().mean(dim=1), 1024)
        at = torch.bucketize(other.double().mean(dim=1), cutoffs)  # 0: below all, read by no bin
        for images in (64, 128, 256, 512):
            drawn = [torch.randperm(5000, generator=generator)[:images] for _ in range(40)]
            alone = [int((at[one].bincount(minlength=1)[1:] == 1).sum()) for one in drawn]
            share, law = sum(alone) / (40 * images), (1 - 1 / 1024) ** (images - 1)
            print(f"{bins}, {images} images: {share:.3f}, law {law:.3f}")
            assert share == pytest.approx(law, abs=0.04)


@cifar
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("images", [64, 256, 512])
def test_the_share_that_passes_18_db_is_the_laws_times_the_auto_encoders(
    images: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plug_in(monkeypatch, "dataset", "cifar-test", clients_and_surrogate)
    passes: list[float] = []
    fitted = auto_encoder.train

    def watched(encoder: Any, decoder: Any, split: Split, **settings: Any) -> None:
        fitted(encoder, decoder, split, **settings)
        private = part("test_1")
        maps = auto_encoder.encoded(encoder, private, torch.device("cpu"))
        shown = auto_encoder.decoded(decoder, maps, torch.device("cpu"))
        truth = private.batch(torch.arange(len(private)))[0]
        mse = (shown - truth).square().flatten(1).mean(dim=1)
        passes.append(float((-10 * mse.log10() > 18).double().mean()))

    monkeypatch.setattr(auto_encoder, "train", watched)
    rounds = max(1, 512 // images)
    page = run_inline(
        Scenario.from_flat(
            {
                **DEFAULTS,
                "threat-model": "G",
                "attack": "scale-mia(epochs=12)",
                "channel": f"secagg(max_weight={images // 8})",
                "data.dataset": "cifar-test",
                "model.name": "cnn",
                "federation.clients": 8,
                "federation.rounds": rounds,
                "federation.local": f"fedsgd(batch_size={images // 8}, lr=1e-9)",
                "audit.criterion": "psnr>=18",
                "output.dir": str(tmp_path),
            }
        ),
        "a test",
    )
    leak = json.loads((page.parent / "report.json").read_text())["leak"]
    law = (1 - 1 / 1024) ** (images - 1)
    print(
        f"{rounds} sums of {images}: share {leak['leak_rate']:.3f}, law {law:.3f} x decoder "
        f"{passes[-1]:.3f}; PSNR {leak['psnr']}"
    )
    assert leak["leak_rate"] == pytest.approx(law * passes[-1], abs=0.08)
