"""The decoder: RoPE, the rule of attention, MLPs and experts, layers, their compiled forms."""
