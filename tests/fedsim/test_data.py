"""What the data sets hold, and what they say when they cannot."""

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from fedsim import registry
from fedsim.data import DataSet, Split, load_dataset
from fedsim.data.embedded import FLATTEST, photo_tiles
from fedsim.data.holdout import hold_out
from fedsim.data.tensors import save_tensors
from fedsim.errors import ScenarioError

ROOT = Path(__file__).parents[2]
SHAPES = {
    "digits": ((1, 8, 8), 10),
    "lfw-faces": ((1, 25, 25), 2),
    "photo-tiles": ((3, 32, 32), 10),
    "photo-tiles(size=64)": ((3, 64, 64), 10),
}


def check(data: DataSet) -> None:
    for split in (data.train, data.test):
        images, labels = split.batch(torch.arange(len(split)))
        assert images.shape[1:] == data.spec.shape
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.dtype == torch.int64
        assert set(labels.tolist()) == set(range(len(data.classes)))


@pytest.mark.parametrize("expression", SHAPES)
def test_embedded_data_is_there_whole_and_the_same_every_time(expression: str) -> None:
    data = load_dataset(expression)
    check(data)
    assert (data.spec.shape, data.spec.num_classes) == SHAPES[expression]
    again = registry.build("dataset", expression, "data.dataset")
    assert torch.equal(data.train.images, again.train.images)
    assert torch.equal(data.test.images, again.test.images)


def test_photo_tiles_are_enough_to_train_and_to_test_on() -> None:
    data = load_dataset("photo-tiles")
    assert data.train.images.dtype == torch.uint8
    assert len(data.train) >= 2000
    assert len(data.test) >= 500


@pytest.mark.parametrize("size", [32, 64])
def test_no_pixel_is_in_train_and_test(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Photographs that number their columns show where each tile was cut."""
    columns = np.repeat(np.arange(240, dtype=np.uint8), size // 32)
    ruler = np.broadcast_to(columns[None, :, None], (200, len(columns), 3))
    monkeypatch.setattr("fedsim.data.embedded._photographs", lambda: {"ruler": lambda: ruler})
    monkeypatch.setattr("fedsim.data.embedded.FLATTEST", 0.0)
    data = photo_tiles(size=size)
    assert not set(data.train.images.unique().tolist()) & set(data.test.images.unique().tolist())


def test_no_photo_tile_is_flat() -> None:
    for split in (load_dataset("photo-tiles").train, load_dataset("photo-tiles").test):
        images, _ = split.batch(torch.arange(len(split)))
        assert images.flatten(2).std(dim=2).mean(dim=1).min() >= FLATTEST - 1e-6


def test_photo_tiles_come_in_two_sizes_only() -> None:
    with pytest.raises(ScenarioError, match="32 or 64"):
        load_dataset("photo-tiles(size=48)")


@given(labels=st.lists(st.integers(0, 3), min_size=1, max_size=60), fraction=st.floats(0, 0.99))
def test_held_out_examples_leave_every_class_in_train(labels: list[int], fraction: float) -> None:
    images = torch.arange(len(labels)).view(-1, 1, 1, 1)
    train, test = hold_out(images, torch.tensor(labels), fraction)
    both = torch.cat([train.images, test.images]).flatten()
    assert torch.equal(both.sort().values, torch.arange(len(labels)))
    assert set(train.labels.tolist()) == set(labels)
    for label in set(labels):
        count = labels.count(label)
        assert (test.labels == label).sum() == min(int(count * fraction), count - 1)


# -- files of torchvision --------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_missing_torchvision_files_name_path_and_remedy(name: str, tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match="download=True") as caught:
        load_dataset(f"{name}(root='{tmp_path}')")
    assert str(tmp_path) in str(caught.value)


def test_a_torchvision_set_needs_its_root() -> None:
    with pytest.raises(ScenarioError, match="needs root"):
        load_dataset("cifar10")


@pytest.mark.parametrize(
    ("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")]
)
def test_idx_files_are_read_whole(name: str, folder: str, tmp_path: Path) -> None:
    root = os.environ.get("FEDSIM_TEST_DATA", "")
    packed = sorted((Path(root) / name.replace("-", "_")).glob("*.gz")) if root else []
    if len(packed) != 4:
        pytest.skip("FEDSIM_TEST_DATA names no folder with mnist/*.gz and fashion_mnist/*.gz")
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    for file in packed:
        with gzip.open(file) as source, (raw / file.stem).open("wb") as target:
            shutil.copyfileobj(source, target)
    data = load_dataset(f"{name}(root='{tmp_path}')")
    check(data)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert data.spec.shape == (1, 28, 28)


def test_cifar10_is_read_whole() -> None:
    root = Path(os.environ.get("FEDSIM_TEST_DATA", "/nowhere"))
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip("FEDSIM_TEST_DATA names no folder with cifar-10-batches-py/")
    data = load_dataset(f"cifar10(root='{root}')")
    check(data)
    assert data.classes[0] == "airplane"
    assert data.spec.mean == (0.4914, 0.4822, 0.4465)


# -- a folder of pictures --------------------------------------------------------------------------
def pictures(folder: Path, count: int = 5) -> Path:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (40 + index, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_of_pictures_is_resized_and_split(tmp_path: Path) -> None:
    data = load_dataset(f"image-folder(path='{pictures(tmp_path)}', size=24)")
    check(data)
    assert data.spec.shape == (3, 24, 24)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (8, 2)


def test_an_unreadable_picture_is_named(tmp_path: Path) -> None:
    broken = pictures(tmp_path) / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ScenarioError, match=r"dog/3\.png is not a readable picture"):
        load_dataset(f"image-folder(path='{tmp_path}')")


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"there is no folder .*absent"):
        load_dataset(f"image-folder(path='{tmp_path / 'absent'}')")
    with pytest.raises(ScenarioError, match="one subfolder for each class"):
        load_dataset(f"image-folder(path='{tmp_path}')")
    (tmp_path / "cat").mkdir()
    with pytest.raises(ScenarioError, match="one subfolder for each class"):
        load_dataset(f"image-folder(path='{tmp_path}')")


# -- the hub ---------------------------------------------------------------------------------------
@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no telemetry, no cache but this test's."""
    import datasets
    import huggingface_hub.constants
    from flwr_datasets.common import telemetry

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "0")


@pytest.mark.usefixtures("offline")
def test_a_hub_set_that_cannot_be_had_says_so() -> None:
    with pytest.raises(ScenarioError, match="check the name, or the network"):
        load_dataset("huggingface(name='nobody/has-this-data-set')")


def test_offline_the_hub_is_not_tried() -> None:
    """In a process of its own: Hugging Face reads its settings once, on import."""
    code = "from fedsim.data import load_dataset; load_dataset(\"huggingface(name='nobody/none')\")"
    known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**known, "PYTHONPATH": str(ROOT), "FEDSIM_OFFLINE": "1"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "nobody/none cannot be loaded (ConnectionError: Couldn't reach" in done.stderr
    assert "OfflineModeIsEnabled" in done.stderr
    assert "Retrying" not in done.stderr


@pytest.mark.usefixtures("offline")
def test_a_local_copy_is_read_through_flwr_datasets(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pictures(tmp_path / "set" / split, count=3)
    data = load_dataset(f"huggingface(name='{tmp_path / 'set'}', size=32)")
    check(data)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.test)) == (6, 6)
    with pytest.raises(ScenarioError, match="no column 'img'; there is: image, label"):
        load_dataset(f"huggingface(name='{tmp_path / 'set'}', image='img')")
    with pytest.raises(ScenarioError, match="set size=32"):
        load_dataset(f"huggingface(name='{tmp_path / 'set'}')")


@pytest.mark.usefixtures("offline")
def test_a_set_without_a_test_split_gets_one(tmp_path: Path) -> None:
    pictures(tmp_path / "set" / "train")
    data = load_dataset(f"huggingface(name='{tmp_path / 'set'}', size=16)")
    assert (len(data.train), len(data.test)) == (8, 2)


# -- one's own tensors -----------------------------------------------------------------------------
def split_of(count: int) -> Split:
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    return Split(images, torch.arange(count) % 3)


@pytest.mark.parametrize(("argument", "test"), [("", 2), (", test_fraction=0.0", 0)])
def test_saved_tensors_come_back(argument: str, test: int, tmp_path: Path) -> None:
    split = split_of(10)
    save_tensors(tmp_path / "own.safetensors", split, ["a", "b", "c", "d"])
    data = load_dataset(f"tensors(path='{tmp_path / 'own.safetensors'}'{argument})")
    assert data.classes == ("a", "b", "c", "d")  # also those that this client does not have
    assert (len(data.train), len(data.test)) == (10 - test, test)
    assert torch.equal(torch.cat([data.train.images, data.test.images]), split.images)
    assert torch.equal(torch.cat([data.train.labels, data.test.labels]), split.labels)
    assert data.spec.shape == (3, 8, 8)


def test_a_files_own_test_split_is_used(tmp_path: Path) -> None:
    train, test = split_of(6), split_of(4)
    path = tmp_path / "own.safetensors"
    content = {"images": train.images, "labels": train.labels.int()}
    save_file({**content, "test_images": test.images, "test_labels": test.labels}, path)
    data = load_dataset(f"tensors(path='{path}')")
    check(data)
    assert data.classes == ("0", "1", "2")
    assert torch.equal(data.test.images, test.images)
    with pytest.raises(ScenarioError, match="would be ignored"):
        load_dataset(f"tensors(path='{path}', test_fraction=0.2)")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"images": torch.rand(4, 3, 8, 8)}, "needs images and labels"),
        ({"images": torch.rand(4, 8, 8), "labels": torch.arange(4)}, r"\[N, C, H, W\]"),
        ({"images": torch.rand(4, 3, 8, 8), "labels": torch.arange(3)}, r"\[N, C, H, W\]"),
        ({"images": torch.rand(0, 3, 8, 8), "labels": torch.arange(0)}, "N > 0"),
        ({"images": torch.rand(4, 3, 8, 8) * 255, "labels": torch.arange(4)}, r"in \[0, 1\]"),
        (
            {"images": torch.full((4, 3, 8, 8), torch.nan), "labels": torch.arange(4)},
            r"in \[0, 1\]",
        ),
        ({"images": torch.ones(4, 3, 8, 8).long(), "labels": torch.arange(4)}, "uint8"),
        ({"images": torch.rand(4, 3, 8, 8), "labels": torch.rand(4)}, "integers from 0"),
        ({"images": torch.rand(4, 3, 8, 8), "labels": torch.arange(4) - 1}, "integers from 0"),
    ],
)
def test_tensors_of_the_wrong_kind_are_refused(
    content: dict[str, torch.Tensor], says: str, tmp_path: Path
) -> None:
    save_file(content, tmp_path / "own.safetensors")
    with pytest.raises(ScenarioError, match=says):
        load_dataset(f"tensors(path='{tmp_path / 'own.safetensors'}')")


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"there is no file .*absent"):
        load_dataset(f"tensors(path='{tmp_path / 'absent.safetensors'}')")
    (tmp_path / "other.safetensors").write_bytes(b"not one at all")
    with pytest.raises(ScenarioError, match="not a readable safetensors file"):
        load_dataset(f"tensors(path='{tmp_path / 'other.safetensors'}')")


def test_more_labels_than_classes_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "own.safetensors", split_of(10), ["a", "b"])
    with pytest.raises(ScenarioError, match="label 2 and only 2 classes"):
        load_dataset(f"tensors(path='{tmp_path / 'own.safetensors'}')")
