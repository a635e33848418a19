"""Which layer groups cost most by being quantized, and the recipe for a budget."""
