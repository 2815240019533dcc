"""What requests ask for, one file an endpoint, and what they need: bodies, notes, streams."""
