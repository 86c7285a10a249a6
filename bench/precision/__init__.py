"""Rounding errors of the low-memory states."""
