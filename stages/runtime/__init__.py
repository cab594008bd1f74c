"""Contract, identity, sealing: how a stage runs, whatever it does."""
