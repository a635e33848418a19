"""Measure the cost of quantization: base and quantized models run over the same text."""
