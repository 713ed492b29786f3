"""Stored results: sweeps, tables, plots. Reading them never imports torch."""
