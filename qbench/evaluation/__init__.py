"""Measuring a model: corpora, perplexity protocols and zero-shot tasks."""
