"""Decoding: requests in flight, the blocks of the cache they hold, the rows of the next step, and their answers."""
