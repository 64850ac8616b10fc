"""Quality under skipping: tasks that measure what a method costs, and the evaluation of methods by tasks.

Task.run(Method) -> Outcome, item by item -> bootstrap -> cell of the results file -> table, plot
"""
