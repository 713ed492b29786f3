"""The bundled world: a small English-like world, its corpus, questions and trained twins."""
