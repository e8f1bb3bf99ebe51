"""An attack has a process of its own: what it tries there, the run does not notice."""

import json
import os
import ssl
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from torchvision.io import read_file

from fedsim import seeds
from fedsim.audit.landlock import restrict
from fedsim.data import load_dataset
from fedsim.data.embedded import digits
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed
from fedsim.threat import Knowledge
from fedsim.view import ServerView
from tests.fedsim.small import (
    attack_by,
    federated,
    latest,
    scenario,
    told,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kernel() -> None:
    """Skip where only Python's own hook watches."""
    walled: list[bool] = []
    thread = threading.Thread(target=lambda: walled.append(restrict([])))
    thread.start()
    thread.join()
    if not walled[0]:
        pytest.skip("this kernel has no Landlock: nothing stops a library that opens files in C++")


def tried(deeds: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Try everything; say how it went, as a sly attack would without failing."""
    outcome = {}
    for name, deed in deeds.items():
        try:
            outcome[name] = f"did it: {deed()!r}"
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
    return outcome


# -- what a library opens, no hook of Python's sees ---------------------------------------------


def overwrite(path: Path) -> None:
    with pyarrow.OSFile(str(path), "wb") as file:
        file.write(b'[audit]\ncriterion = "psnr>=1"\n')


def overwrite_as_torch(path: Path) -> None:
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data", b"psnr>=1", 7)
    writer.write_end_of_file()


NATIVE_READERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.from_file(str(path), size=8, dtype=torch.uint8),
    "torchvision": lambda path: read_file(str(path)),
    "pyarrow": lambda path: pyarrow.OSFile(str(path), "rb").read(),
}
OF_A_RUN = ("scenario.toml", "federation.json", "environment.json", "events.jsonl")


@pytest.mark.usefixtures("kernel")
def test_no_library_writes_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, str]:
        run = (tmp_path / "latest").resolve()
        return tried(
            {
                f"{way.__name__} {name}": lambda way=way, name=name: way(run / name)
                for way in (overwrite, overwrite_as_torch)
                for name in (*OF_A_RUN, "new.toml", "reconstructions/cheat.safetensors")
            }
        )

    page = run_inline(scenario(tmp_path, attack_by(monkeypatch, write)), "a test")
    outcome = told(latest(tmp_path))
    assert len(outcome) == 12
    assert not [name for name, how in outcome.items() if how.startswith("did it")]
    assert latest(tmp_path).scenario.audit.criterion == "psnr>=20"
    report = json.loads((page.parent / "report.json").read_text())
    assert report["leak"]["psnr_limit"] == 20
    assert not (page.parent / "new.toml").exists()


@pytest.mark.usefixtures("kernel")
def test_no_library_reads_the_run_or_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, str]:
        run, home = (tmp_path / "latest").resolve(), tmp_path / "home"
        files = [run / name for name in OF_A_RUN]
        files += [home / "auditor.key", home / "secret.key", run / "vault/client-0/round-1.sealed"]
        files += [run / "views" / "round-1-client-0.safetensors"]
        return tried(
            {
                f"{way} {file.name}": lambda way=way, file=file: NATIVE_READERS[way](file)
                for way in NATIVE_READERS
                for file in files
            }
        )

    seeds.secret_key()
    ran = federated(tmp_path, attack_by(monkeypatch, read))
    assert (ran.folder.path / "views" / "round-1-client-0.safetensors").is_file()
    assert not [name for name, how in told(ran).items() if how.startswith("did it")]


# -- the data -----------------------------------------------------------------------------------


def closure(function: Any) -> Any:
    """Return the function that another one wraps."""
    return next(cell.cell_contents for cell in function.__closure__ if callable(cell.cell_contents))


def load_astronaut() -> object:
    from skimage import data

    return data.astronaut()


def load_sklearn() -> object:
    from sklearn.datasets import load_digits

    return load_digits()


def sample_image() -> object:
    from sklearn.datasets import load_sample_image

    return load_sample_image("china.jpg")


DATA: dict[str, Callable[[], object]] = {
    "the raw loader": lambda: closure(load_dataset)("digits"),
    "the raw data set": lambda: closure(digits)(),
    "scikit-learn's digits": load_sklearn,
    "scikit-learn's pictures": sample_image,
    "scikit-image's pictures": load_astronaut,
}


@pytest.mark.parametrize("way", DATA)
def test_no_data_set_can_be_loaded(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deed = DATA[way]
    changes = attack_by(monkeypatch, lambda views, knowledge: deed())
    with pytest.raises(RunFailed, match=r"attack code tried to .*nothing it made may be believed"):
        federated(tmp_path, changes)


@pytest.mark.usefixtures("kernel")
def test_no_library_reads_the_pictures_that_ship_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, str]:
        import skimage
        import sklearn

        near = Path(sklearn.__file__).parent / "datasets"
        files = [near / "data/digits.csv.gz", near / "images/china.jpg"]
        files += [Path(skimage.__file__).parent / "data" / "astronaut.png", Path(skimage.__file__)]
        return tried({file.name: lambda file=file: read_file(str(file))[0] for file in files})

    outcome = told(federated(tmp_path, attack_by(monkeypatch, read)))
    assert [how.startswith("did it") for how in outcome.values()] == [False, False, False, True]


def pictures(folder: Path) -> None:
    """Write a data set of forty pictures of two classes."""
    for number in range(40):
        file = folder / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)


LOOKS: dict[str, Callable[[str], object]] = {
    "listing": lambda root: list(Path(root).iterdir()),
    "reading": lambda root: (Path(root) / "a" / "0.png").read_bytes(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_at_the_data_on_disk_fails_the_run(
    look: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "pictures")
    root, deed = str(tmp_path / "pictures"), LOOKS[look]
    changes = attack_by(monkeypatch, lambda views, knowledge: deed(root))
    changes["data.dataset"] = f"image-folder(path={root!r}, size=8)"
    with pytest.raises(RunFailed, match="attack code tried to touch a sealed path"):
        federated(tmp_path / "runs", changes)


@pytest.mark.usefixtures("kernel")
def test_no_library_reads_the_data_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "pictures")

    def read(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, str]:
        file = tmp_path / "pictures" / "a" / "0.png"
        return tried({way: lambda way=way: NATIVE_READERS[way](file) for way in NATIVE_READERS})

    changes = attack_by(monkeypatch, read)
    changes["data.dataset"] = f"image-folder(path={str(tmp_path / 'pictures')!r}, size=8)"
    outcome = told(federated(tmp_path / "runs", changes))
    assert outcome.keys() == NATIVE_READERS.keys()
    assert not [how for how in outcome.values() if how.startswith("did it")]


# -- the seed, and what else the range knows ----------------------------------------------------


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The scenario as somebody typed it, on a command line that names the seed."""
    file = tmp_path / "mine" / "scenario.toml"
    file.parent.mkdir()
    file.write_text("seed = 424242\n")
    no_name = "4" * 600  # as Flower gives its servers on their command lines
    monkeypatch.setattr(sys, "argv", ["fedsim", "run", str(file), "seed=424242", no_name])
    return file


@pytest.mark.parametrize("file", ["scenario.toml", "other.toml"])
def test_a_look_at_the_scenario_as_typed_fails_the_run(
    file: str, typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed.with_name("other.toml").write_text("seed = 424242\n")
    named = str(typed.with_name(file))
    changes = attack_by(monkeypatch, lambda views, knowledge: Path(named).read_text())
    with pytest.raises(RunFailed, match="attack code tried to touch a sealed path"):
        federated(tmp_path, changes)


@pytest.mark.parametrize("whose", ["self", "parent"])
def test_a_look_at_a_command_line_fails_the_run(
    whose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(f"/proc/{'self' if whose == 'self' else os.getpid()}/cmdline")
    changes = attack_by(monkeypatch, lambda views, knowledge: path.read_text())
    with pytest.raises(RunFailed, match="or command line"):
        federated(tmp_path, changes)


def everything(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, Any]:
    """What this process was started with, as far as Python tells."""
    return {
        "arguments": [*sys.argv, *sys.orig_argv],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "views": sorted(vars(views)),
        "knowledge": {name: repr(value) for name, value in vars(knowledge).items()},
        "closures": [
            repr(cell.cell_contents)
            for value in (*vars(views).values(), *vars(knowledge).values())
            for cell in getattr(value, "__closure__", None) or ()
        ],
    }


@pytest.mark.usefixtures("kernel", "typed")
def test_nothing_in_the_process_tells_the_seed_or_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_SECRET_KEY", "42" * 32)
    changes = {**attack_by(monkeypatch, everything), "seed": 424242}
    ran = federated(tmp_path, changes)
    outcome = json.dumps(told(ran))
    assert "424242" not in outcome
    assert "FEDSIM_" not in outcome
    assert str(tmp_path) not in outcome.replace(told(ran)["environment"].get("PYTHONPATH", ""), "")
    assert "num_examples={'round" not in outcome


@pytest.mark.usefixtures("kernel")
def test_no_library_reads_about_the_range_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    range_ = os.getpid()

    def read(views: Sequence[ServerView], knowledge: Knowledge) -> dict[str, str]:
        files = [f"/proc/{whose}/{what}" for whose in (range_, os.getppid())
                 for what in ("cmdline", "environ", "mem", "maps", "status")]  # fmt: skip
        # OpenSSL opens it in C; that it then finds no certificate is an SSLError.
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        files.append("/proc/cpuinfo")
        return tried({file: lambda file=file: tls.load_verify_locations(file) for file in files})

    *refused, allowed = told(federated(tmp_path, attack_by(monkeypatch, read))).values()
    assert len(refused) == 10
    assert all(how.startswith("PermissionError") for how in refused)
    assert allowed.startswith("SSLError")


# -- the auditor --------------------------------------------------------------------------------


def flatter(views: Sequence[ServerView], knowledge: Knowledge) -> object:
    """Replace the auditor's own functions, wherever this process can reach them."""
    from fedsim.audit import leak, metrics, verdict

    certain = type(leak.METRICS["psnr"])
    for name in list(leak.METRICS):
        leak.METRICS[name] = certain(  # type: ignore[index]
            **{**vars(leak.METRICS[name]), "function": lambda a, b: torch.full((len(a),), 99.0)}
        )
    metrics.psnr = lambda a, b: torch.full((len(a),), 99.0)  # type: ignore[assignment]
    verdict.judge = lambda folder: None  # type: ignore[assignment]
    return [float(leak.METRICS["psnr"].function(torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)))]


def test_whoever_replaces_the_metrics_replaces_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = run_inline(scenario(tmp_path, attack_by(monkeypatch, flatter)), "a test")
    assert told(latest(tmp_path)) == [99.0]
    report = json.loads((page.parent / "report.json").read_text())
    assert report["leak"]["leaked"] == 0
    assert report["leak"]["psnr"]["max"] < 20
