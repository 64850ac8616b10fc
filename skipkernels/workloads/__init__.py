"""Workloads of the serving benches: arrival times, jobs, synthetic profiles, the fusion classifier."""
