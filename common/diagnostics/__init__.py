"""Probes that find a bug in anyone's code, and the gallery that measures the probes."""
