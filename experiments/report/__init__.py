"""Makes the tables and figures of README.md and docs/ from committed runs.

``experiments/results/<name>/`` holds a run's results.csv, its manifest.json and what its figures
need besides (``results.py``). A page names what it shows in comments (``pages.py``):

    <!-- table NAME [TABLE] -->
    <!-- end -->

    <!-- figure NAME FIGURE | what it shows, for those who cannot see it -->
    <!-- end -->

What stands between them is written by the report. NAME is a folder of results, or ``benchmarks``
with a table of `benchmarks.lib.report`. Which tables and figures there are, the experiment says: in
``Report``, which its ``run.py`` gives to its `Experiment` (``registry.py`` lists these).
"""
