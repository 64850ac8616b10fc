"""Chats: what a conversation is to a model, and language models that answer one as a ``ModalityModel``."""
