"""What a model's inputs look like, and weights chosen with them, block by block."""
