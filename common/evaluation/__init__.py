"""Measuring: bits per byte, tasks, extraction, grading, traces."""
