"""Where the app runs."""
