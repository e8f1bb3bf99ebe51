"""MKOR: what each class's row says, what the maps say, and what comes back through a federation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from fedsim import reconstructions
from fedsim.attack import Reconstruction
from fedsim.data import DataSet, DataSpec, Split, load_dataset
from fedsim.defense import Batch, ClientContext, Defense
from fedsim.errors import RunFailed, ScenarioError
from fedsim.models import build_model, initial_model
from fedsim.threat import Knowledge
from strategies.attacks.analytic.isolation.mkor import MKOR, taken_apart
from strategies.attacks.analytic.isolation.orthogonality import bounds, overwrite, windows
from tests.fedsim.small import NOBODY, federated, plug_in
from tests.strategies.isolation.one_client import best_psnr
from tests.strategies.isolation.test_published_figures import FOLDER, part

EXACT = 100.0


@dataclass(frozen=True, kw_only=True)
class RawNLL(Defense):
    """The loss of the authors' clients: NLL on logits that no softmax has seen."""

    paper = NOBODY
    changes_upload = False

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: ClientContext) -> Tensor:
        return nll_loss(model(batch[0]), batch[1])


class Honest(MKOR):
    """Sends what it was given."""

    def craft(self, expression: str, arrays: dict[str, Tensor], knowledge: Knowledge) -> Any:
        crafted = super().craft(expression, arrays, knowledge)
        return type(crafted)(expression, arrays)


@pytest.fixture(autouse=True)
def _plugged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "defense", "raw-nll", RawNLL)

    def one_each(size: int = 32, twice: bool = False) -> DataSet:
        """The middle tile of each photograph, and where ``twice`` another one of the last."""
        return chosen(load_dataset(f"photo-tiles(size={size})").train, 10 + twice)

    def cifar_one_each(size: int = 32, batch: int = 0) -> DataSet:
        """The first image (or the next ones) of each class, enlarged as the authors do."""
        found = chosen(part("test_1"), 10, batch)
        enlarged = torch.nn.functional.interpolate(
            found.train.images.float(), (size, size), mode="bilinear", antialias=True
        )
        images = enlarged.round().clamp(0, 255).to(torch.uint8)
        train = Split(images, found.train.labels)
        return DataSet(train, train, found.classes)

    plug_in(monkeypatch, "dataset", "one-each", one_each)
    plug_in(monkeypatch, "dataset", "cifar-one-each", cifar_one_each)


def chosen(split: Split, count: int, skip: int = 0) -> DataSet:
    """One example of each of ten classes, and more of the last."""
    members = [(split.labels == label).nonzero().flatten() for label in range(10)]
    taken = [own[len(own) // 2 + skip] for own in members]
    taken += [members[9][extra] for extra in range(count - 10)]
    train = split.subset(torch.stack(taken))
    return DataSet(train, train, tuple("0123456789"))


@dataclass(frozen=True)
class Read:
    """One client's images ``[B, C, H, W]`` by label, what came back, and how near."""

    truth: Tensor
    labels: Tensor
    found: Reconstruction

    @property
    def psnr(self) -> Tensor:
        """Of each private image."""
        return best_psnr(self.truth, self.found.examples)


def read(folder: Path, attack: str, model: str, changes: dict[str, Any] | None = None) -> Read:
    ran = federated(
        folder,
        {
            "attack": attack,
            "data.dataset": "one-each",
            "model.name": model,
            "federation.clients": 1,
            "federation.local": "fedsgd(batch_size=10)",
            **(changes or {}),
        },
    )
    assert ran.failures == []
    (path,) = (ran.folder.path / "reconstructions").glob("*.safetensors")
    record = ran.vault.record(0, 1)
    assert record is not None
    order = record.labels.argsort()
    found, _ = reconstructions.load(path)
    return Read(record.examples[order].double(), record.labels[order], found)


NLL = {"defenses": "raw-nll"}


@pytest.mark.parametrize("model", ["mlp(hidden=[])", "mlp(hidden=[64, 32])"])
def test_under_cross_entropy_all_classes_but_the_sacrificed_come_back_exactly(
    model: str, tmp_path: Path
) -> None:
    seen = read(tmp_path, "mkor(sacrificed=3)", model)
    assert seen.found.labels is not None
    assert seen.found.labels.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert (seen.psnr >= EXACT).tolist() == [label != 3 for label in range(10)]


def test_under_raw_nll_the_authors_parameters_give_back_every_class(tmp_path: Path) -> None:
    seen = read(tmp_path, "mkor(sacrificed=None)", "mlp(hidden=[])", NLL)
    assert seen.psnr.min() >= EXACT


def test_under_cross_entropy_the_authors_parameters_give_back_nobody(tmp_path: Path) -> None:
    """With one image a class every row's bias gradient is 1/K - 1/B = 0."""
    seen = read(tmp_path, "mkor(sacrificed=None)", "mlp(hidden=[])")
    assert seen.psnr.mean() < 12


def test_several_images_of_a_class_come_back_as_their_mean(tmp_path: Path) -> None:
    changes = {"data.dataset": "one-each(twice=True)"}
    changes["federation.local"] = "fedsgd(batch_size=11)"
    seen = read(tmp_path, "mkor", "mlp(hidden=[])", changes)
    assert seen.labels.tolist()[-2:] == [9, 9]
    mean = seen.truth[-2:].mean(dim=0, keepdim=True)
    assert best_psnr(mean, seen.found.examples) >= EXACT
    assert seen.found.scores is not None
    # Of two images the row is twice as strong, and the attack less sure.
    assert seen.found.scores.tolist() == pytest.approx([1.0] * 8 + [0.5], rel=1e-4)


def test_lenet_brings_the_image_back_blurred(tmp_path: Path) -> None:
    seen = read(tmp_path, "mkor", "lenet5(maps=[12, 48])")
    assert 17 <= seen.psnr[1:].mean() <= 32


def test_a_flat_image_goes_through_lenet_unchanged(tmp_path: Path) -> None:
    """Every mean of equal pixels is the pixel, however often it is squashed."""
    model = build_model("lenet5", DataSpec((1, 28, 28), 10, (0.5,), (0.2,))).double()
    before, _, plan = taken_apart(model, model.spec)
    overwrite(before, plan, 1)
    maps = torch.full((1, 1, 28, 28), 0.3, dtype=torch.float64)
    for layer in before.values():
        if not isinstance(layer, torch.nn.Flatten):
            maps = layer(maps)
    starts = windows(plan)
    assert len(set(starts)) == 16
    assert {(down % 4, right % 4) for down, right in starts} == {
        (down, right) for down in range(4) for right in range(4)
    }
    for _ in range(2):
        maps = maps.logit()
    assert maps[0, :16].detach().allclose(torch.tensor(0.3, dtype=torch.float64))


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("side", [25, 32, 64, 96])
def test_every_pixel_lies_between_the_bounds_that_vgg_tells(side: int, padding: str) -> None:
    spec = DataSpec((3, side, side), 10, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    model = initial_model(f"vgg16(padding_mode={padding!r}, hidden=16)", spec, 0).double()
    before, _, plan = taken_apart(model, spec)
    overwrite(before, plan, 3)
    assert [layer.shift for layer in plan.layers] == [0] * 6 + [1, 0, 0, 1, 0, 0, 1]
    assert len(windows(plan)) == 64
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(side)).double()
    maps = image
    for layer in before.values():
        if not isinstance(layer, torch.nn.Flatten):
            maps = layer(maps)
    groups = maps[0, : plan.channels(3)[-1][1]].detach().view(64, 6, *maps.shape[2:])
    lower, upper = bounds(groups, plan, spec.shape)
    assert (lower <= image[0] + 1e-9).all()
    assert (image[0] <= upper + 1e-9).all()


def test_vgg_at_64_pixels_gives_back_coarse_images(tmp_path: Path) -> None:
    seen = read(tmp_path, "mkor", "vgg16(hidden=16)", {"data.dataset": "one-each(size=64)"})
    tiles = chosen(load_dataset("photo-tiles(size=64)").train, 10).train
    images, _ = tiles.batch(torch.arange(10))
    flat = -10 * images.var(dim=(1, 2, 3), correction=0).log10()  # each one's own mean
    assert flat[1:].mean() + 0.8 <= seen.psnr[1:].mean() <= 21


def test_dropout_silences_images_and_spoils_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the features it can only take an image's gradient away; what is on hangs on the key.

    An image that others are mixed into (below 20 dB) may come back mixed otherwise.
    """
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "33" * 32)
    changes = {"model.batchnorm": "private", "seed": 8}
    kept = read(tmp_path / "on", "mkor", "vgg16(hidden=16)", changes)
    whole = read(tmp_path / "off", "mkor", "vgg16(hidden=16, dropout=0.0)", changes)
    assert kept.found.labels is not None
    assert 1 <= len(kept.found.labels) < 9
    found, alone = kept.psnr[kept.found.labels], whole.psnr[kept.found.labels]
    assert (alone > 20).sum() >= 2
    assert found[alone > 20].allclose(alone[alone > 20], atol=0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"federation.local": "fedavg(batch_size=5)"}, "use fedsgd"),
        ({"model.name": "convnet"}, "no plain sequence"),
        ({"model.name": "cnn"}, "otherwise than planned"),
        ({"model.name": "mlp(hidden=[5])"}, "10 units, one for each class"),
        ({"model.name": "lenet5"}, "maps=\\[12, 48\\]"),
        ({"attack": "mkor(sacrificed=10)"}, "0 to 9"),
        ({"threat-model": "B"}, "manipulation"),
    ],
)
def test_what_cannot_work_is_refused_before_anybody_trains(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ScenarioError, match=said):
        read(tmp_path, "mkor", "mlp(hidden=[])", changes)
    assert not list(tmp_path.rglob("views"))


def test_a_view_of_other_parameters_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="not decoupled"):
        read(tmp_path, "honest-mkor", "mlp(hidden=[])")


@pytest.fixture(autouse=True)
def _honest(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, "attack", "honest-mkor", Honest)


# -- on CIFAR-10, as the card measured it ---------------------------------------------------------
cifar = pytest.mark.skipif(
    not (FOLDER / "test_1.npz").exists(),
    reason="FEDSIM_TEST_DATA names no folder that holds cifar10/test_1.npz",
)
VGG = "vgg16(hidden=64, padding_mode='replicate')"


@cifar
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("attack", "changes", "low", "high"),
    [
        ("mkor(sacrificed=None)", NLL, 22.5, 27.0),
        ("mkor(sacrificed=None)", {}, 7.0, 12.0),
        ("mkor", {}, 22.5, 27.0),
    ],
    ids=["raw NLL", "cross-entropy", "cross-entropy, one class sacrificed"],
)
def test_vgg16_at_224(
    attack: str, changes: dict[str, Any], low: float, high: float, tmp_path: Path
) -> None:
    sets = {"data.dataset": "cifar-one-each(size=224)"}
    seen = read(tmp_path, attack, VGG, {**sets, **changes})
    counted = seen.psnr[1:] if attack == "mkor" else seen.psnr
    print(f"{attack} {changes}: mean {counted.mean():.2f} dB of {len(counted)}")
    assert low <= counted.mean() <= high


@cifar
@pytest.mark.parametrize(
    ("attack", "changes"), [("mkor(sacrificed=None)", NLL), ("mkor", {})], ids=["NLL", "CE"]
)
def test_lenet_on_cifar(attack: str, changes: dict[str, Any], tmp_path: Path) -> None:
    psnr = []
    for batch in range(5):
        sets = {"data.dataset": f"cifar-one-each(batch={batch})"}
        psnr.append(read(tmp_path, attack, "lenet5(maps=[12, 48])", {**sets, **changes}).psnr[1:])
    print(f"{attack} {changes}: mean {torch.cat(psnr).mean():.2f} dB")
    assert 17 <= torch.cat(psnr).mean() <= 23
