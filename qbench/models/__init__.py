"""Checkpoints, decoder blocks and their linears, whatever the architecture."""
