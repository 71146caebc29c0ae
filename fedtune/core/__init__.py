"""What everything else may use: the words, errors, checks, files, seeds. It knows of no model, message or run."""
