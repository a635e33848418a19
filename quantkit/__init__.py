"""quantkit: Hugging Face checkpoints to FP8 or INT8, and what that cost in quality."""

__version__ = "0.2.0"
