"""``python -m skipkernels`` is ``skipkernels``."""

from skipkernels.cli import main

main()
