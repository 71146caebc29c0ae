"""What a client does with an instruction: install, train, keep, catch up."""
