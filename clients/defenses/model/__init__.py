"""Defenses that are part of the network, or a private part beside it."""
