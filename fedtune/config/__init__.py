"""From words to settings: what an experiment is, and what may be made of it."""
