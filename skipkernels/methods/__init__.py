"""Methods of skipping work behind one interface: skipped FFNs and, for comparison, skipped layers.

calibration text -> MethodKind.find -> parameters of a method at a ratio -> MethodKind.build -> Method
"""
