"""The verbs that turn images and texts into vectors, and find them again."""
