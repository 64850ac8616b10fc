"""Triton decides when it is imported whether kernels are compiled or interpreted, so one process does one of the two:
this one compiles, and ``test_interpreted.py`` starts another, with TRITON_INTERPRET=1, for the folder beside it."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = ["test_compiled.py", "test_interpreted.py"] if INTERPRETED else ["interpreted"]
