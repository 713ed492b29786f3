"""Published tables, sweep files, and the figures and tables worth keeping."""
