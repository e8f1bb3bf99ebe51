"""Three engines, one answer: the same scenario gives the same views and figures everywhere."""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.deployment import ROOT, cluster, tool

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SMALL = {
    "title": "engines",
    "federation.clients": 3,
    "federation.rounds": 2,
    "federation.threads": 1,
    "federation.local": "fedsgd(batch_size=4, lr=0.1)",
    "model.name": "mlp(hidden=[16])",
    "data.dataset": "digits",
    "attack": "robbing-the-fed(units=64)",
    "threat-model": "G",
}


def scenario_file(folder: Path, out: Path) -> Path:
    from fedsim.scenario import Scenario

    path = folder / "small.toml"
    path.write_text(Scenario.from_flat({**SMALL, "output.dir": str(out)}).to_toml())
    return path


def only_run(out: Path) -> Path:
    (run,) = [path for path in out.iterdir() if path.is_dir() and not path.is_symlink()]
    return run


def figures(run: Path) -> dict:
    report = json.loads((run / "report.json").read_text())
    leak = report["leak"]
    return {
        "leak": {key: value for key, value in leak.items() if key != "lpips"},
        "examples": report["examples"],
        "accuracy": report["federation"]["accuracy"],
        "bytes": [report["federation"]["bytes_up"], report["federation"]["bytes_down"]],
        "failures": report["federation"]["failures"],
    }


def assert_same_run(one: Path, other: Path) -> None:
    views = sorted(path.name for path in (one / "views").glob("*.safetensors"))
    assert views == sorted(path.name for path in (other / "views").glob("*.safetensors"))
    assert len(views) == 3 * 2 + 2  # replies, and what was sent each round
    reconstructions = [p.name for p in (one / "reconstructions").glob("*.safetensors")]
    assert reconstructions
    for name in [f"views/{v}" for v in views] + [f"reconstructions/{r}" for r in reconstructions]:
        left, right = load_file(one / name), load_file(other / name)
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), f"{name}: {key}"
    assert figures(one) == figures(other)


@pytest.fixture(scope="module")
def inline_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inline")
    out = folder / "runs"
    done = subprocess.run(
        [tool("fedsim"), "run", str(scenario_file(folder, out))],
        env={**os.environ, "FEDSIM_HOME": str(folder / "home"), "FEDSIM_OFFLINE": "1"},
        capture_output=True, text=True, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.splitlines()[-1])
    assert page.name == "report.html"
    assert page.is_file()
    return only_run(out)


def test_simulation_gives_the_inline_answer(
    tmp_path: Path, inline_run: Path, fedsim_home: Path
) -> None:
    out = tmp_path / "simulation"
    file = scenario_file(tmp_path, out)
    done = subprocess.run(
        [tool("fedsim"), "run", str(file), "--engine", "simulation"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_file()
    assert_same_run(inline_run, only_run(out))


def test_cluster_gives_the_inline_answer_once_the_auditor_has_the_vaults(
    tmp_path: Path, inline_run: Path, fedsim_home: Path
) -> None:
    folder, out = tmp_path / "cluster", tmp_path / "deployed"
    folder.mkdir()
    file = scenario_file(folder, out)
    subprocess.run(
        [tool("fedsim"), "partition", str(file), "--out", str(folder / "data")],
        check=True, capture_output=True,
    )  # fmt: skip
    with cluster(folder, 3, fedsim_home) as running:
        status, details, log = running.run(file, seconds=400)
        assert status == "finished:completed", f"{details}\n{log[-4000:]}"
        run = only_run(out)
        report = json.loads((run / "report.json").read_text())
        assert report["leak"] is None
        assert "fedsim report RUN --vault DIR" in report["leak_reason"]
        vaults = [str(running.vault(node)) for node in range(3)]
    judged = subprocess.run(
        [tool("fedsim"), "report", str(run), *[a for v in vaults for a in ("--vault", v)]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert judged.returncode == 0, judged.stderr
    assert_same_run(inline_run, run)


def test_every_scenario_holds_only_what_flwr_run_takes() -> None:
    """What `flwr run --run-config FILE` needs: declared keys, and nothing but scalars."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    for path in sorted((ROOT / "scenarios").rglob("*.toml")):
        for key, value in tomllib.loads(path.read_text()).items():
            assert key in declared, f"{path.name}: {key}"
            if isinstance(value, dict):
                for name, inner in value.items():
                    assert name in declared[key], f"{path.name}: {key}.{name}"
                    assert isinstance(inner, str | int | float | bool), f"{path.name}: {key}.{name}"
