"""One paper, one file: pure functions on tensors, in the paper's symbols.

`calibration/block_quantizer.py` applies them to a decoder block.
"""
