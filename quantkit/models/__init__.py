"""A model's contents, and running it block by block."""
