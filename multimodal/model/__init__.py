"""The network and what it learns from: ids, sequences, losses, files of weights."""
