"""Bases, and the adapters on them."""
