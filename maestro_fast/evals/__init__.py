"""Benchmarks of weight policies: worlds of conflicting rewards, and the statistics to compare methods."""
