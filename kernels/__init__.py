"""The op modules, one folder each. `reference.py` is the specification; the other files are devices."""
