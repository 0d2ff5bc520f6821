"""Mixers of positions that more than one line uses, and their parts; imports no line."""
