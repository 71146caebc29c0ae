"""What a run, and a comparison of runs, leave on disk: written and read in one place each."""
