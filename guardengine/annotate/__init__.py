"""Annotating data sets with a checkpoint: `guardengine annotate`, and `guardengine.annotate.run.annotate` in Python."""
