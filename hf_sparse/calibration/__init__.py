"""Calibration data: text to batches."""
