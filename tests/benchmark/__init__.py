"""Measurements of speed, run by hand; no test depends on a time."""
