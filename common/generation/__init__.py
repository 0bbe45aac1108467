"""Sampling and scoring: one engine for every model."""
