"""Export a quantized checkpoint: plan it from a model and a recipe, write it, and verify it."""
