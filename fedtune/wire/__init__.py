"""Instructions and updates as bytes and Flower messages, and all that they cost on the way."""
