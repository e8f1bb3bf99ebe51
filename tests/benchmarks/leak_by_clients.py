"""Leak rate behind SecAgg+ against the number of clients, and against local steps.

    FEDSIM_TEST_DATA=... python tests/benchmarks/leak_by_clients.py [NAME ...] [--out runs/leak]
        [--data cifar10|photo-tiles] [--page docs/methods/under-secure-aggregation.md]

Runs the attacks that claim secure aggregation behind ``secagg`` at 2, 8 and 32 clients, and every
active attack after 1, 2, 8 and 32 local steps, with the settings of ``leak_settings.py``; then
writes the page and, beside it, its figure.  An attack that refuses says why, and one without
settings that a scenario of ``scenarios/`` puts behind ``secagg`` is named on the page.  With names
it runs those alone, and writes no page.

The images behind a point are the same for 2, 8 and 32 clients as far as they go: 16 federations of
2 clients hold what 4 of 8 hold, or one of 32.  All clients take part in one round, each with all
that it has.  Finished federations are kept in ``--out``, one file each, so that the command goes on
where it stopped; delete them when an attack changes.
"""

import argparse
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from leak_page import Row, write_page
from leak_settings import (
    CLIENTS,
    STEPS,
    SUMMED,
    Setting,
    Setup,
    behind_secagg,
    by_steps,
)
from safetensors.torch import save_file

from fedsim.data import Split, load_dataset
from fedsim.engines.inline import run_inline
from fedsim.errors import RunFailed, ScenarioError
from fedsim.scenario import Scenario

COMMAND = "FEDSIM_TEST_DATA=... python tests/benchmarks/leak_by_clients.py"
# One attacker: the same images of its own, and so the same cut-offs, whoever its clients are.
SEED = 1
# So many of the attacker's own images tune the traps, and their law.
OWN = 100


@dataclass(frozen=True)
class Federation:
    """One federation of a cell: which setting, and which part of the images it holds."""

    setting: Setting
    data: str
    part: int

    @property
    def key(self) -> str:
        """A name for its file: another setting has another."""
        setting = {k: v for k, v in asdict(self.setting).items() if k != "federations"}
        told = json.dumps([setting, self.data, self.part], sort_keys=True)
        return f"{self.setting.name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


@cache
def pool(data: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Return the images that clients draw from, other images like them, and the classes."""
    if data != "cifar10":
        loaded = load_dataset(data)
        return loaded.train, loaded.test, loaded.classes
    folder = Path(os.environ["FEDSIM_TEST_DATA"]) / "cifar10"
    splits = []
    for name in ("train_1", "test_1"):
        with np.load(folder / f"{name}.npz") as stored:
            labels = torch.from_numpy(stored["y"]).long()
            splits.append(Split(torch.from_numpy(stored["x"]), labels))
    return splits[0], splits[1], tuple(str(label) for label in range(10))


def write_data(federation: Federation, file: Path) -> None:
    """Write as many images as all clients hold, distinct ones, and the attacker's own."""
    private, other, classes = pool(federation.data)
    wanted = federation.setting.holders * federation.setting.images
    start = federation.part * wanted
    order = torch.randperm(len(private), generator=torch.Generator().manual_seed(1))
    chosen = order[start : start + wanted]
    if len(chosen) < wanted:
        raise SystemExit(f"{federation.data} has {len(private)} images, too few for this setting")
    content = {
        "images": private.images[chosen].contiguous(),
        "labels": private.labels[chosen].contiguous(),
        "test_images": other.images.contiguous(),
        "test_labels": other.labels.contiguous(),
    }
    save_file(content, file, metadata={"classes": json.dumps(classes)})


def ran(federation: Federation) -> dict[str, Any]:
    """Run one federation; return how many images were judged, and how well each came back."""
    setting = federation.setting
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.safetensors"
        write_data(federation, file)
        scenario = Scenario.from_flat(
            {
                **setting.flat(),
                "seed": SEED,
                "federation.threads": 1,
                "data.dataset": f"tensors(path='{file}')",
                "output.dir": folder,
            }
        )
        started = time.perf_counter()
        try:
            page = run_inline(scenario, COMMAND)
        except (ScenarioError, RunFailed) as error:
            return {"refused": getattr(error, "remedy", None) or str(error)}
        report = json.loads((page.parent / "report.json").read_text())
    judged = [e for e in report["examples"] if setting.judges(e["client"])]
    floor = report["leak"]["floor"]
    return {
        "psnr": [e["psnr"] if e["match"] is not None else None for e in judged],
        "floor": floor and floor["leak_rate"],
        "seconds": time.perf_counter() - started,
    }


def cell(setting: Setting, data: str, out: Path) -> Iterator[dict[str, Any]]:
    """Yield what each federation of a cell gave, from its file where there is one."""
    for part in range(setting.federations):
        federation = Federation(setting, data, part)
        file = out / f"{federation.key}.json"
        if not file.exists():
            result = ran(federation)
            file.write_text(json.dumps(result))
            print(f"{setting.name} {setting.point}: part {part} {told(result)}", flush=True)
        yield json.loads(file.read_text())


def told(result: dict[str, Any]) -> str:
    """Return one federation's result in a line."""
    if "refused" in result:
        return f"refused: {result['refused']}"
    at_20 = sum(psnr is not None and psnr >= 20 for psnr in result["psnr"])
    return f"{at_20} of {len(result['psnr'])} at 20 dB, {result['seconds']:.0f} s"


def chosen_setups(names: Sequence[str]) -> list[Setup]:
    """Return what to run along both axes; those named, or all."""
    known = [*SUMMED, *by_steps()]
    return [setup for setup in known if not names or setup.name in names]


def main() -> None:
    """Run what is not in the cache, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("runs/leak-by-clients"))
    parser.add_argument("--data", choices=["cifar10", "photo-tiles"], default="cifar10")
    page = Path("docs/methods/under-secure-aggregation.md")
    parser.add_argument("--page", type=Path, default=page)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for setup in chosen_setups(chosen.names):
        points = CLIENTS if setup.axis == "clients" else STEPS
        measured = {p: list(cell(setup.at(p), chosen.data, chosen.out)) for p in points}
        rows.append(Row(setup, measured))
    own, _ = pool(chosen.data)[1].batch(torch.arange(OWN))
    if chosen.names:
        return
    absent = behind_secagg() - {row.setup.name for row in rows if row.setup.axis == "clients"}
    write_page(chosen.page, rows, own.flatten(1), absent, chosen.data, COMMAND)
    print(chosen.page)


if __name__ == "__main__":
    main()
