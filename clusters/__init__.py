"""Cluster files, found by name: ``orchestrate clusters``."""
