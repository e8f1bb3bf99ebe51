"""FedSim: a privacy range for federated learning.

``fedsim`` is the range itself and names no attack and no defense: those live in the packages
``strategies`` (what a server does) and ``clients`` (what a client does), found by name through
:mod:`fedsim.registry`.
"""

import os

if os.environ.get("FEDSIM_OFFLINE") == "1":  # here, because each is read once, on import
    for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[_name] = "1"
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
