"""Modality selection: jobs of multimodal requests under a deadline and an accuracy requirement (MOSEL, EMNLP 2024).

A model offers strategies (modality subset, skip level); a profile says what each costs and achieves; the scheduler
chooses among them for every request that waits. The same scheduler runs on real workers (``runtime``) and on a virtual
clock (``simulator``).
"""
