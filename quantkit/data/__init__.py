"""Text to windows of tokens, for calibration and evaluation."""
