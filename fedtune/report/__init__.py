"""From run folders to a page: read them, put side by side what can be compared, and say what that shows."""
