"""``Attack.reconstruct`` runs in a process that never held the truth.

::

    the range (parent.py) ──control──> a process that forks (server.py), started without run data
        │                                   │ forks one child for each attack
        └────────────── line ───────────────┘ (child.py): walls itself in, attacks, hands back

The child holds the attack, and asks for the rest over its line (wire.py): views, and what
``Knowledge`` grants.  The parent answers, and records what was asked for.  See
docs/decisions/009-an-attack-has-a-process-of-its-own.md.
"""
