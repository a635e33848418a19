"""Turning text into windows of tokens, for calibration and evaluation."""
