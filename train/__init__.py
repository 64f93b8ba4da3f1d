"""Everything that makes a run: one job per module, started with `python -m train.<job>`."""
