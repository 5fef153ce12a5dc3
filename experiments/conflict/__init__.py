"""A dial for conflict between tasks: labels turned round and inputs changed, task by task.

Beside the files of every experiment: ``changes.py`` (what changes a task's inputs).
"""
