"""guardengine evaluate: the metrics of the released evaluation scripts, on labelled conversations."""
