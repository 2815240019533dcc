"""The network and what it learns from: ids, attention, sequences, losses, files of weights."""
