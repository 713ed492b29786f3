"""Cells, runs and sweeps, what they would take, and the store of their results."""
