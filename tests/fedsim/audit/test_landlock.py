import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.io import read_file

from fedsim.audit.landlock import restrict


def in_a_thread(function):
    """Landlock cannot be lifted: every restriction gets a thread of its own."""
    outcome = []

    def inside() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    return outcome[0]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    sealed, free = tmp_path / "sealed", tmp_path / "free"
    for folder in (sealed, free):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "key").write_bytes(b"0123456789abcdef")
        save_file({"x": torch.ones(3)}, folder / "inner" / "x.safetensors")
    if not in_a_thread(lambda: restrict([sealed])):
        pytest.skip("this kernel has no Landlock")
    return sealed, free


READERS = {
    "python": lambda folder: (folder / "inner" / "key").read_bytes(),
    "listing": lambda folder: list((folder / "inner").iterdir()),
    "torchvision": lambda folder: read_file(str(folder / "inner" / "key")),
    "torch": lambda folder: torch.from_file(
        str(folder / "inner" / "key"), size=16, dtype=torch.uint8
    ),
    "safetensors": lambda folder: safe_open(folder / "inner" / "x.safetensors", "pt").keys(),
}


@pytest.mark.parametrize("reader", READERS)
def test_no_library_reads_what_is_sealed(folders: tuple[Path, Path], reader: str) -> None:
    sealed, free = folders

    def attempt(folder: Path):
        restrict([sealed])
        return READERS[reader](folder)

    assert isinstance(in_a_thread(lambda: attempt(sealed)), Exception)
    assert not isinstance(in_a_thread(lambda: attempt(free)), Exception)
    assert not isinstance(in_a_thread(lambda: READERS[reader](sealed)), Exception)


def test_a_folder_inside_stays_readable_where_asked(folders: tuple[Path, Path]) -> None:
    sealed, _ = folders
    (sealed / "secret").write_text("truth")

    def attempt(path: Path):
        restrict([sealed], readable=["/", sealed / "inner"])
        return path.read_bytes()

    assert in_a_thread(lambda: attempt(sealed / "inner" / "key")) == b"0123456789abcdef"
    assert isinstance(in_a_thread(lambda: attempt(sealed / "secret")), PermissionError)
