"""Federated fine-tuning of language models, with the true cost of each method."""

__version__ = "0.1.0"
