"""Evaluation of methods that skip: tasks that measure how much output quality each of them costs.

Task.run(Method) -> Outcome, item by item -> bootstrap -> cell of the results file -> table, plot
"""
