"""Streams as JSON: snapshots, the audit log and its reader."""
