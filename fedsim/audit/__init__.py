"""The auditor: the only one who holds the key to the vault, the truth that clients deposit."""
