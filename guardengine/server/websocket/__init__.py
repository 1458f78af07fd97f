"""The WebSocket protocol: a connection and its streams."""
