"""fedtune from Python: what the command line does, with values for words and data frames for files (docs/python.md)."""
