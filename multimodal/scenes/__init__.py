"""Synthetic scenes: pictures of which everything is known, with captions and questions."""
