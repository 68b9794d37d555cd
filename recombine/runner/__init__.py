"""Sweeps: a grid of runs, the workers that run them, and what became of each."""
