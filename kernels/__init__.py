"""Operators, one package each: `reference.py` defines it in plain PyTorch, `triton.py` computes it on a GPU."""
