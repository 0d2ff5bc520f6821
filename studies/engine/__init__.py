"""Runs a study's arms over seeds, and weighs its claims."""
