"""Checks of a checkpoint and of a log: quantization against float32, an audit log against the model."""
