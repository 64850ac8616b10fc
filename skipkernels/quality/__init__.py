"""Quality under skipping: methods that leave out work, tasks that measure what that costs, and the evaluation of both.

calibration text -> MethodKind.find -> what a method needs at a ratio -> MethodKind.build -> Method
Task.run(Method) -> Outcome, item by item -> bootstrap -> cell of the results file -> table, plot
"""
