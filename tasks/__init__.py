"""Evaluation task definitions as data: one folder of lm-eval YAML per benchmark.

The prompts and metrics are those of lm-evaluation-harness 0.4.13, pinned here so that a number
keeps its meaning when the harness moves on; where a definition was mended, its comment says how.
``schemas`` and ``pages`` hold what a template cannot say; ``originals`` reads the authors' files.

``metadata`` carries what lm-eval has no field for: ``summary`` (one line for ``qbench list``),
``original`` (the authors' file, by name pattern and reader) and ``rows`` (use the first N).
"""
