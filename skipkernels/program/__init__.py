"""What a step is: the op table, the recorded program, its state, and the reference that defines the semantics."""

from skipkernels.program.program import Program as Program
from skipkernels.program.program import build_program as build_program
