"""Ratings: every user of MovieLens-100K is a task of few samples.

Beside the files of every experiment: ``model.py`` (the network), ``baselines.py`` (biases and
matrix factorisation) and ``choose.py`` (the command that chooses decays on validation users).
"""
