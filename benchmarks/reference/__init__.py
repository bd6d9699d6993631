"""Plain references that benchmarks compare with."""
