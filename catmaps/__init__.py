"""Categorical flow maps: continuous flow language models that write text in a few network calls."""

__version__ = "0.1.0"
