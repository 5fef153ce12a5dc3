"""Vision (paper, section 4 and appendix E.1): binary image tasks and an MLP-Mixer.

Beside the files of every experiment: ``augment.py`` (crops and flips) and ``mixer.py`` (the model).
"""
