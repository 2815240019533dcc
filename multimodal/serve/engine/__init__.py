"""What computes for requests, and what they hold. Nothing here knows HTTP but its statuses."""
