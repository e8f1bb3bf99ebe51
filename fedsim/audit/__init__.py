"""The auditor: the only one who holds the key to the vault, the truth that clients deposit."""

from fedsim.audit.verdict import judge

__all__ = ["judge"]
