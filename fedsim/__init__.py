"""FedSim: a privacy range for federated learning.

``fedsim`` is the range itself and names no attack and no defense: those live in the packages
``strategies`` (what a server does) and ``clients`` (what a client does), found by name through
:mod:`fedsim.registry`.
"""
