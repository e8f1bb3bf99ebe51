"""Scenarios that are refused: what is wrong, the key that is named, and what is said."""

from typing import Any

FEDAVG = {"federation.local": "fedavg(epochs=1, batch_size=8, lr=0.1)"}
# changes, the key that the message names, what it says
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown key": ({"federation.client": 3}, "federation.client", "'federation.clients'"),
    "unknown top-level key": ({"atack": "none"}, "atack", "did you mean 'attack'?"),
    "underscore for hyphen": ({"threat_model": "A"}, "threat_model", "'threat-model'"),
    "unknown table": ({"audits.criterion": "psnr>=20"}, "audits", "there is no such key"),
    "value for a table": ({"audit": 3}, "audit", "table, [audit]; there is: audit.criterion"),
    "key inside a value": ({"title.first": 3}, "title.first", "table; did you mean 'title'?"),
    "unknown attack": ({"attack": "wathcing"}, "attack", "did you mean 'watching'?"),
    "unknown defense": ({"defenses": "clpi"}, "defenses", "did you mean 'clip'?"),
    "unknown channel": ({"channel": "secag"}, "channel", "did you mean 'secagg'?"),
    "unknown model": ({"model.name": "convent"}, "model.name", "did you mean 'convnet'?"),
    "unknown data set": ({"data.dataset": "digit"}, "data.dataset", "did you mean 'digits'?"),
    "unknown partition": (
        {"data.partition": "dirichle(alpha=1.0)"},
        "data.partition",
        "did you mean 'dirichlet'?",
    ),
    "unknown strategy": (
        {"federation.strategy": "fedavgg"},
        "federation.strategy",
        "did you mean 'fedavg'?",
    ),
    "unknown local rule": (
        {"federation.local": "fedsdg()"},
        "federation.local",
        "did you mean 'fedsgd'?",
    ),
    "unknown threat model": ({"threat-model": "Z"}, "threat-model", "'A', 'B'"),
    "unknown policy": ({"model.batchnorm": "free"}, "model.batchnorm", "'frozen', 'shared'"),
    "unknown precision": ({"federation.precision": "half"}, "federation.precision", "'float32'"),
    "text for a number": ({"seed": "seven"}, "seed", "write a whole number of at least 0"),
    "number for text": ({"attack": 3}, "attack", "write text, for instance 'none'"),
    "truth for a number": ({"federation.rounds": True}, "federation.rounds", "a whole number"),
    "list": ({"defenses": ["clip"]}, "defenses", "write text"),
    "no clients": (
        {"federation.clients": 0},
        "federation.clients",
        "of at least 1, for instance 4",
    ),
    "threads that would crash the process": (
        {"federation.threads": 100_000},
        "federation.threads",
        "write a whole number of at least 0 and at most 1024, for instance 0",
    ),
    "no rounds": ({"federation.rounds": 0}, "federation.rounds", "of at least 1, for instance 1"),
    "negative seed": ({"seed": -1}, "seed", "of at least 0 and at most"),
    "too large a share": (
        {"federation.fraction": 1.5},
        "federation.fraction",
        "above 0 and at most 1",
    ),
    "share is no number": (
        {"federation.fraction": float("nan")},
        "federation.fraction",
        "above 0 and",
    ),
    "endless timeout": (
        {"federation.timeout": float("inf")},
        "federation.timeout",
        "most 31536000",
    ),
    "cohort of zero": ({"federation.fraction": 0.2}, "federation.fraction", "at least 0.25"),
    "argument of wrong type": (
        {"federation.local": "fedsgd(batch_size='two')"},
        "federation.local: fedsgd(batch_size)",
        "write a whole number of at least 1, for instance 8",
    ),
    "argument out of range": (
        {"defenses": "clip(norm=-1.0)"},
        "defenses: clip(norm)",
        "write a number of at least 1e-15 and at most 1e+15, for instance 1.0",
    ),
    "delta that lets one example be published": (
        {"defenses": "dp-sgd(delta=0.5)"},
        "defenses",
        "delta=0.5 is no promise to 361 examples: one of them may be told outright; let delta be",
    ),
    "delta that lets one client be published": (
        {"defenses": "soteriafl(delta=0.25)"},
        "defenses",
        "delta=0.25 is no promise to 4 clients",
    ),
    "delta of a noise that is not of the defense's own clip": (
        {"defenses": "clip | gaussian(delta=0.3)"},
        "defenses",
        "let delta be below 0.25, 1 / 4",
    ),
    "delta at the server": (
        {"defenses": "central-dp(delta=0.3)"},
        "defenses",
        "delta=0.3 is no promise to 4 clients",
    ),
    "norm that noise cannot be measured by": (
        {"defenses": "clip(norm=1e-320) | gaussian"},
        "defenses: clip(norm)",
        "of at least 1e-15",
    ),
    "noise that leaves float32": (
        {"defenses": "dp-sgd(sigma=1e300)"},
        "defenses: dp-sgd(sigma)",
        "at least 0 and at most 1000000",
    ),
    "noise above any update": (
        {"defenses": "clip | gaussian(std=1e7)"},
        "defenses: gaussian(std)",
        "above 0 and at most 1000000",
    ),
    "norm that follows beyond all numbers": (
        {"defenses": "central-dp(rate=1e300)"},
        "defenses: central-dp(rate)",
        "above 0 and at most 10",
    ),
    "share of the weight that nobody is below": (
        {"channel": "emulated-tapfed(largest_share=0.2)"},
        "channel",
        "of 4 clients one has at least 0.25 of all weight",
    ),
    "rounding that leaves no update": (
        {"channel": "secagg(max_weight=2, quantization_range=2)"},
        "channel",
        "would be rounded to multiples of 8",
    ),
    "weight beside which none counts": (
        {"channel": "secagg(max_weight=1e300)"},
        "channel",
        "a smaller clipping_range or max_weight",
    ),
    "weight that is rounded off": (
        {"channel": "secagg(max_weight=1e7, clipping_range=0.1)"},
        "channel",
        "examples would weigh 0.839 steps",
    ),
    "blocks that nobody mixes": (
        {"attack": "sparse-linear-layer", "threat-model": "G", "channel": "fragmented"},
        "attack",
        "refuse to mix it with another's; use channel = 'plain' or one that sums",
    ),
    "clipping that leaves no value": (
        {"channel": "secagg(clipping_range=1e-300)"},
        "channel",
        "would be cut off at 5e-298, below 1e-06",
    ),
    "epsilon that no noise is known for": (
        {"defenses": "local-dp(epsilon=1e300)"},
        "defenses: local-dp(epsilon)",
        "above 0 and at most 1000000",
    ),
    "argument unknown": (
        {"model.name": "mlp(hiden=[3])"},
        "model.name: mlp(hiden)",
        "did you mean 'hidden'?",
    ),
    "argument without a name": (
        {"defenses": "clip(1.0)"},
        "defenses",
        "arguments need their names",
    ),
    "argument is an expression": (
        {"defenses": "clip(norm=abs(-1))"},
        "defenses",
        "must be a literal",
    ),
    "argument twice": ({"defenses": "clip(norm=1.0, norm=2.0)"}, "defenses", "stands there twice"),
    "strategy's argument unknown": (
        {"federation.strategy": "fedadam(eta_g=0.1)"},
        "federation.strategy: fedadam(eta_g)",
        "did you mean 'eta'? there is: eta, beta_1, beta_2, tau",
    ),
    "strategy's argument that Flower never reads": (
        {"federation.strategy": "fedadam(eta_l=0.5)"},
        "federation.strategy: eta_l",
        "Flower keeps it and never reads it; leave it out: clients train with the lr of "
        "federation.local",
    ),
    "strategy's argument out of range": (
        {"federation.strategy": "fedyogi(tau=0.0)"},
        "federation.strategy: fedyogi(tau)",
        "write a finite number above 0, for instance 0.001",
    ),
    "momentum that Flower would ignore": (
        {"federation.strategy": "fedavgm(server_momentum=-0.5)"},
        "federation.strategy: fedavgm(server_momentum)",
        "of at least 0 and below 1",
    ),
    "momentum that is none": (
        {"federation.strategy": "fedavgm"},
        "federation.strategy",
        "write fedavgm(server_momentum=0.9)",
    ),
    "trimming nobody": (
        {"federation.strategy": "fedtrimmedavg"},
        "federation.strategy",
        "of 4 uploads it trims none; let beta be at least 0.25",
    ),
    "trimming two": (
        {"federation.strategy": "fedtrimmedavg", "federation.clients": 2},
        "federation.strategy",
        "needs 3 uploads a round, not 2",
    ),
    "too few for Krum": (
        {"federation.strategy": "krum(num_malicious_nodes=50)"},
        "federation.strategy",
        "needs 103 uploads a round (2 num_malicious_nodes + 3), not 4",
    ),
    "fewer than nobody for Krum": (
        {"federation.strategy": "krum(num_malicious_nodes=-1)"},
        "federation.strategy: krum(num_malicious_nodes)",
        "of at least 0",
    ),
    "MultiKrum of more than there are": (
        {
            "federation.strategy": "multikrum(num_malicious_nodes=1, num_nodes_to_select=99)",
            "federation.clients": 6,
        },
        "federation.strategy",
        "choosing 99 of 6 uploads is averaging all; let num_nodes_to_select be at most 5",
    ),
    "MultiKrum with a malicious upload": (
        {
            "federation.strategy": "multikrum(num_malicious_nodes=2, num_nodes_to_select=6)",
            "federation.clients": 7,
        },
        "federation.strategy",
        "takes in a malicious one; let num_nodes_to_select be at most 5",
    ),
    "batch that no client can fill": (
        {"federation.local": "fedsgd(batch_size=1000)", "federation.clients": 10},
        "federation.local",
        "no client holds 1000 examples; let batch_size be at most 145",
    ),
    "policy for statistics that there are not": (
        {"model.batchnorm": "private"},
        "model.batchnorm",
        "mlp(hidden=[8]) has no BatchNorm; write 'frozen', or use a model that has it",
    ),
    "baseline of nothing": (
        {"audit.baseline": True},
        "audit.baseline",
        "the run is its own baseline; write false",
    ),
    "no output folder": ({"output.dir": ""}, "output.dir", "write text, not empty, for instance"),
    "seed beyond 64 bits": (
        {"seed": 2**63},
        "seed",
        "of at least 0 and at most 9223372036854775807, for instance 7",
    ),
    "strategy's argument is the range's": (
        {"federation.strategy": "fedavg(fraction_train=0.5)"},
        "federation.strategy: fraction_train",
        "federation.fraction",
    ),
    "partition's argument is the range's": (
        {"data.partition": "iid(num_partitions=3)"},
        "data.partition: iid(num_partitions)",
        "federation.clients",
    ),
    "proximal term that would be zero": (
        {"federation.strategy": "fedprox(proximal_mu=0.1)"},
        "federation.strategy",
        "fedavg(...)",
    ),
    "proximal term that is zero": (
        {"federation.strategy": "fedprox", **FEDAVG},
        "federation.strategy",
        "write fedprox(proximal_mu=0.1)",
    ),
    "too few for Bulyan": (
        {"federation.strategy": "bulyan(num_malicious_nodes=1)"},
        "federation.strategy",
        "needs 7 uploads a round",
    ),
    "median of one aggregate": (
        {"federation.strategy": "fedmedian", "channel": "secagg"},
        "federation.strategy",
        "one aggregate",
    ),
    "two attacks": ({"attack": "watching | watching"}, "attack", "one attack a run"),
    "attack stronger than its threat model": (
        {"attack": "choosy", "threat-model": "C"},
        "threat-model",
        "choosy needs statistics; the least threat model is E",
    ),
    "manipulation by an eavesdropper": (
        {"attack": "robbing-the-fed", "threat-model": "D"},
        "threat-model",
        "the least threat model is G",
    ),
    "attack on a model it cannot read": (
        {"attack": "convolution-reader"},
        "attack",
        "use model.name = 'lenet'",
    ),
    "oracle not granted": (
        {"attack": "oracular"},
        "oracles",
        "write oracles = 'labels', and the report wears a badge",
    ),
    "oracle granted and unused": ({"attack": "watching", "oracles": "labels"}, "oracles", "leave"),
    "oracle unknown": ({"attack": "watching", "oracles": "lables"}, "oracles", "'labels'"),
    "defense that cannot act": (
        {"defenses": "linear-only", **FEDAVG},
        "defenses",
        "use federation.local = 'fedsgd(...)'",
    ),
    "guarantee that shared statistics void": (
        {
            "defenses": "clip(norm=1.0) | gaussian(std=1.0)",
            "model.name": "resnet20(width=4)",
            "model.batchnorm": "shared",
        },
        "model.batchnorm",
        "void its guarantee; use 'frozen' or 'private'",
    ),
    "guarantee that statistics of a model to come may void": (
        {
            "defenses": "clip(norm=1.0) | gaussian(std=1.0)",
            "model.name": "convnet(width=4, dropout=0.5)",
            "model.batchnorm": "shared",
        },
        "model.batchnorm",
        "of any model the server asks for",
    ),
    "defenses in the wrong order": (
        {"defenses": "late | linear-only"},
        "defenses",
        "linear-only must come before late",
    ),
    "defense twice": ({"defenses": "late | late"}, "defenses", "late stands there twice"),
    "missing data folder": (
        {"data.dataset": "image-folder(path='/nowhere')"},
        "data.dataset",
        "/nowhere",
    ),
    "missing data file": (
        {"data.dataset": "tensors(path='/nowhere.safetensors')"},
        "data.dataset",
        "/nowhere.safetensors",
    ),
    "more clients than examples": (
        {"federation.clients": 100_000},
        "data.partition",
        "cannot be split among 100000 clients",
    ),
    "client without an example": (
        {"data.partition": "dirichlet(alpha=0.01)", "federation.clients": 40},
        "data.partition",
        "min_partition_size",
    ),
    "a channel among the defenses": (
        {"defenses": "secagg | quantize"},
        "defenses",
        "it is a channel, not a defense: write it under the key 'channel'",
    ),
    "a defense as the channel": (
        {"channel": "quantize"},
        "channel",
        "it is a defense, not a channel: write it under the key 'defenses'",
    ),
    "secure aggregation of one": (
        {"channel": "secagg", "federation.clients": 1},
        "channel",
        "at least 2 clients",
    ),
    "secure sum that overflows": (
        {"channel": "secagg(quantization_range=2147483648)"},
        "channel",
        "at most 1 clients, or a quantization_range of at most 1073741823",
    ),
    "batch too heavy for the secure sum": (
        {"channel": "secagg(max_weight=4)", "federation.local": "fedsgd(batch_size=16)"},
        "channel",
        "let max_weight be at least 16",
    ),
    "partition too heavy for the secure sum": (
        {"channel": "secagg(max_weight=8)", **FEDAVG},
        "channel",
        "let max_weight be at least 3",
    ),
    "bad criterion": ({"audit.criterion": "psnr=20"}, "audit.criterion", "psnr>=20"),
    "criterion of an unknown metric": ({"audit.criterion": "pnsr>=20"}, "audit.criterion", "psnr"),
}
