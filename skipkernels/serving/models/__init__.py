"""Models that are served: a fusion classifier of sound and video, and multimodal language models of transformers."""
