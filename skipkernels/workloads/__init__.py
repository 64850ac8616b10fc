"""What is served in benches: arrivals, jobs, profiles that were not measured, the fusion classifier."""
