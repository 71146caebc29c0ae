"""What every other part of fedtune builds on."""
