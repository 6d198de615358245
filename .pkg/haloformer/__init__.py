"""Haloformer: a distributed trainer for Longformer and LED with sequence-parallel attention."""

__version__ = "0.1.0"
