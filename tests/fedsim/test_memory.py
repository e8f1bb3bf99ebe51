"""Five hundred clients cost time, not memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = """
import json, resource, sys
from pathlib import Path
from fedsim.engines.inline import run_inline
from tests.fedsim.small import scenario
folder, changes = sys.argv[1], json.loads(sys.argv[2])
run_inline(scenario(Path(folder), changes), "a test")
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
"""


def peak(folder: Path, clients: int, attack: str) -> float:
    """Return a run's peak resident memory in MiB."""
    changes = {
        "attack": attack,
        "federation.clients": clients,
        "federation.local": "fedsgd(batch_size=1, lr=0.1)",
        "model.name": "mlp(hidden=[2000])",  # 0.6 MB an upload: 500 of them would be 300 MB
    }
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # glibc, left to itself, now and then keeps what was freed: measure what is in use.
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder), json.dumps(changes)],
        env=environment, cwd=folder, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["none", "linear-inversion"])
def test_memory_does_not_grow_with_clients(attack: str, tmp_path: Path) -> None:
    few, many = (peak(tmp_path, clients, attack) for clients in (50, 500))
    print(f"{attack}: {few:.0f} MiB with 50 clients, {many:.0f} MiB with 500")
    assert many < 1.15 * few
