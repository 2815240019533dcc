"""Verbs that make, check and carry folders: shards, tokenizers, models."""
