"""Calibration: what data says of a model, as per-channel statistics and as Fisher information."""
