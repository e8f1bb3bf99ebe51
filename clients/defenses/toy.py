"""The attack that toy cases of defenses may hold fixed; change it, and all their bands move."""

#: A ratio attack on one photograph a client, exact where nothing stands in its way.
RATIO_ATTACK: dict[str, str | int | float | bool] = {
    "threat-model": "A",
    "attack": "linear-inversion",
    "data.dataset": "photo-tiles",
    "model.name": "mlp(hidden=[256])",
    "federation.clients": 4,
    "federation.local": "fedsgd(batch_size=1, lr=0.1)",
}

#: An imprint put before a small model, for detectors to look at.
IMPRINTED: dict[str, str | int | float | bool] = {
    "threat-model": "G",
    "attack": "robbing-the-fed(units=16)",
    "data.dataset": "photo-tiles",
    "model.name": "mlp(hidden=[32])",
    "federation.clients": 4,
    "federation.local": "fedsgd(batch_size=8, lr=0.1)",
}
