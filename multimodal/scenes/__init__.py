"""Synthetic scenes with known ground truth: pictures, captions, questions."""
