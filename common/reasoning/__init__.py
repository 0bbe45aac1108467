"""Strategies: ways to spend tokens on a problem."""
