"""Quantization methods, one file each, written only against qbench's public API."""
