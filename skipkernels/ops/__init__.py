"""The ops of the decode program: their table and their reference implementations."""
