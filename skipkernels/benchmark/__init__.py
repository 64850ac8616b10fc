"""Benchmarks: what a decoded token costs, beside what the machine could do at best."""
