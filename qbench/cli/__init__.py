"""The command line: options, exit codes, and nothing else.

A module per kind of command; the order of their imports is that of ``qbench --help``.
"""

from qbench.cli.application import app, main

from qbench.cli import measuring, reading, making  # isort: skip

__all__ = ["app", "main", "making", "measuring", "reading"]
