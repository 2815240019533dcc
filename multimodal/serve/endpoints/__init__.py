"""What requests ask for, one file an endpoint, and what all of them need: bodies, notes, streams."""
