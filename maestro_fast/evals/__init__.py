"""Benchmarks: worlds of conflicting rewards, and the statistics to compare methods."""
