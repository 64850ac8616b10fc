"""What a checkpoint is: its configuration, weights and text, and prompts of embeddings."""
