"""One paper, one file: its formulas as pure functions on tensors, then the step that applies them
to a `LayerGroup` (`layer_group.py`).

`calibration/block_quantizer.py` applies them to a decoder block.
"""
