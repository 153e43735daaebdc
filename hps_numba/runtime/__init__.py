"""Lookup sessions, the hierarchy and what keeps it fresh."""
