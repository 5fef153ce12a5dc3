"""Causal language models: a folder of text for each task, and adaptation to tasks with little text.

To read it, follow the text: ``data.py`` reads the files and sets text aside, ``tokens.py`` cuts it
into token sequences, ``decoders.py`` makes the models and their tokenizers, ``trials.py`` trains,
and ``run.py`` goes through all trainings. ``manpages.py`` makes folders of manual pages in some
twenty-five languages.
"""
