"""A served model: OpenAI's HTTP interface, and workers on a Ray cluster."""
