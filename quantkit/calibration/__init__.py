"""Statistics of a model's activations, and weights quantized with them, block by block."""
