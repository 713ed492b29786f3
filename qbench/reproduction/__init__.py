"""Published rows, run again: presets, and published beside reproduced."""
