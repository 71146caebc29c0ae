"""The server's side of each method, one file a method."""
