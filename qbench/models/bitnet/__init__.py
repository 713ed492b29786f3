"""BitNet and BitNet b1.58 (arXiv 2310.11453, 2402.17764): layers, models, checkpoint formats."""
