"""From a checkpoint and a recipe to a quantized checkpoint: planned, written, and verified."""
