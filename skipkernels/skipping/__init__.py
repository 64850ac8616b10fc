"""Which FFNs are left out: policies as pure data, and their files."""
