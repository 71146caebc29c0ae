"""Directions regenerated from seeds, and weights that are sums of them."""
