"""Probes of the groundthink line: what the recurrent state holds, and whether the model answers from it."""
