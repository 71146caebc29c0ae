"""What a device can do, and what its owner lets others do on it."""
