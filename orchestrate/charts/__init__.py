"""Figures of a study's report: one file a family of them. Each function takes plain numbers and gives a ``Chart``."""
