"""Evaluation task definitions as data: one folder of lm-eval YAML per benchmark."""
