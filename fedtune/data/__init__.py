"""Rows of files to tokenised examples, divided among clients."""
