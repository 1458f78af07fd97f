"""The `guardengine` command: one file a command."""
