"""One paper, one file: pure functions on tensors, in the paper's symbols. `choosing.py` applies them to a decoder block."""
