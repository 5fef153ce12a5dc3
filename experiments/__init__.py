"""The paper's experiments, ``python -m experiments.<name>``; each writes a run folder.

Every experiment has the same files, beside what is its own:

- ``settings.py``: a frozen dataclass, a subclass of `experiments.lib.experiment.RunSettings`;
- ``data.py``: what it trains on, where that is more than a line;
- ``trials.py``: the trainings: a unit of work in, measured numbers out; writes and prints nothing;
- ``summary.py``: the rows of results.csv, and the table made of them;
- ``figures.py``: ``draw``, which returns the paths of the PNGs; imported when a figure is drawn;
- ``run.py``: ``prepare(settings)``, which checks what can be checked beforehand and returns a
  `Work`, and the `Experiment` in capitals (``LINEAR``), of which
  `experiments.lib.experiment.command` makes the command. Its ``Report`` says what the documentation
  shows of a committed run.

``theory`` has ``statements/`` in the place of the trials.

`experiments.report` makes the tables and figures of the documentation from committed runs.
`experiments.lib` has what two of them need. It does the rest in the same way for all: the command
line, the run folder, notes of settings without effect, the table, and the paths at the end.
"""
