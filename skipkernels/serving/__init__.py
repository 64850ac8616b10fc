"""Modality selection: jobs of multimodal requests under a deadline and an accuracy requirement (MOSEL, EMNLP 2024).

    strategy, job            what is asked: modality subsets and skip levels, requests, answers
    profile, profiler        what each strategy costs and achieves, measured once
    optimiser                the cheapest split of a job over strategies
    scheduler, policies/     which requests run next, and with which strategy
    runtime, executor        the same scheduler on real workers
    simulator                the same scheduler on a virtual clock
"""
