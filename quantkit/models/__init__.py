"""What is in a model, and running it block by block."""
