"""Which sets of Linears cost most, and the recipe for a budget."""
