"""What quantization cost: base and candidates run over the same text and compared."""
