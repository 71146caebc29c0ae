"""Finished runs as files for others: model folders, small adapters."""
