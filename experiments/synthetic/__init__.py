"""The paper's experiments on synthetic data: python -m experiments.synthetic {linear,...}."""
