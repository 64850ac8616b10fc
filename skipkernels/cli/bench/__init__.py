"""``skipkernels bench``: one command a file."""
