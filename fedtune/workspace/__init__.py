"""What a process of either side works with: method, model, data, and both ends of the wire."""
