"""The peers' side of each comparison."""
