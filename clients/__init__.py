"""The client's side: one file per way of training."""
