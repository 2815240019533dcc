"""The decoder: RoPE, the rule of attention, the layers, and their compiled forms."""
