"""The loss from quantizing each layer group, and the recipe for a budget."""
