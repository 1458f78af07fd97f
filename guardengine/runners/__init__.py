"""Runners: a Batch onto a device, scores back."""
