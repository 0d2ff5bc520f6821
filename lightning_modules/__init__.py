"""Lines of research: one package per line, over a shared core."""
