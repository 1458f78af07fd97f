"""moderate and chat at a terminal."""
