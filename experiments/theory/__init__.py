"""The paper's theory, statement by statement: python -m experiments.theory [statement ...]."""
