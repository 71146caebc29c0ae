"""What every part of fedtune shares: the words, errors, files, seeds."""
