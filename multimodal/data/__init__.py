"""Images and shards: reading, verifying, encoding, and work over many of them."""
