"""What tensors look like on the wire, one file per codec."""
