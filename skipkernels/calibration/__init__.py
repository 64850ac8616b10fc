"""Which policy a model bears: similarities, simulation, search, tuning, verification; traces of what it skipped."""
