"""What everything else may use: errors, checks, files, words for people. It knows of no model, message or run."""
