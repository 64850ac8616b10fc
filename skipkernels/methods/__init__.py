"""Ways to leave out work behind one interface: skipped FFNs and, for comparison, skipped layers.

calibration text -> MethodKind.find -> what a method needs at a ratio -> MethodKind.build -> Method
"""
