"""Language (paper, section 4 and appendix E.2): choose the true next utterance of a dialogue.

From a ParlAI file to the table, in the order of the data; ``run.py`` is the command, which puts the
parts together:

1. ``dialogues.py``: a file's lines become dialogues, each with its persona cluster;
2. ``data.py``: clusters become tasks, and every turn gets its candidates;
3. ``encoders.py``: a pretrained model and its tokenizer;
4. ``tokens.py``: every (history, candidate) pair becomes a token sequence, kept in a cache;
5. ``trials.py``: loss, accuracy and batches; what a fine-tuning measures;
6. ``experiments/lib/training.py``: retraining by method, the units of work, their rows, and the
   averages and layout of a table;
7. ``run.py``: the order of the units;
8. ``summary.py``: which columns and rows the table has.

``start.py`` is a command of its own: it trains what all methods may begin with, the common start.
``settings.py`` names the options, ``figures.py`` draws the table, and ``experiments/lib`` keeps the
run folder (``runs.py``) and prints the end (``experiment.py``), as in every experiment.
``progress.py`` estimates the time left, and ``join.py`` makes one table of several runs.
"""
