"""The attention half with relative positions."""
