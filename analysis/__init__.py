"""Many runs, read: time to target, statistics, speed-ups, guards, figures and the report.

Everything here starts from run records (`training.records`) and from nothing else: a number in a report can be
traced to the directories that it was computed from.
"""
