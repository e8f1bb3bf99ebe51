"""Peak memory of a federation against its number of clients.

    python tests/benchmarks/memory.py [--engine inline|simulation] [--clients 50 500]

Runs `fedsim run` on photo tiles with a model of 0.4 million parameters and prints, for each number
of clients, the peak of the summed proportional set size (shared pages counted once) of the command
and every process below it, and seconds a round.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SCENARIO = """
title = "memory"
attack = "none"
[federation]
rounds = 2
local = "fedsgd(batch_size=4, lr=0.1)"
[data]
dataset = "photo-tiles"
[model]
name = "mlp(hidden=[128])"
"""


def family_bytes(root: psutil.Process) -> int:
    """Return the proportional set size of a process and all below it."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def measure(engine: str, clients: int) -> tuple[float, list[float]]:
    """Return peak GiB and seconds a round."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.toml"
        file.write_text(SCENARIO)
        changes = [f"federation.clients={clients}", f"output.dir={folder}/runs"]
        fedsim = str(Path(sys.executable).parent / "fedsim")
        command = [fedsim, "run", str(file), "--engine", engine, *changes]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak = 0
        watching = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not watching.is_set():
                try:
                    peak = max(peak, family_bytes(psutil.Process(process.pid)))
                except psutil.NoSuchProcess:
                    return
                time.sleep(0.5)

        watcher = threading.Thread(target=watch)
        watcher.start()
        output, _ = process.communicate()
        watching.set()
        watcher.join()
        if process.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{output}")
        report = json.loads((Path(output.splitlines()[-1]).parent / "report.json").read_text())
    return peak / 2**30, report["federation"]["round_seconds"]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--engine", choices=("inline", "simulation"), default="inline")
    arguments.add_argument("--clients", type=int, nargs="+", default=[50, 500])
    chosen = arguments.parse_args()
    print(f"{'engine':12}{'clients':>8}{'peak GiB':>10}  seconds a round")
    for clients in chosen.clients:
        peak, seconds = measure(chosen.engine, clients)
        print(f"{chosen.engine:12}{clients:8}{peak:10.2f}  {[round(s, 2) for s in seconds]}")


if __name__ == "__main__":
    main()
