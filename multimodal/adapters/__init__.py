"""Small sets of weights that change what a model does: trained alone, kept in a folder of peft."""
