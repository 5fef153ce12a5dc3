"""The paper's experiments, ``python -m experiments.<name>``; each writes a run folder (runs.py)."""
