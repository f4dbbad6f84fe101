"""The verbs of `lskd`: each reads its arguments, calls one thing and says what came of it.

Importing these modules is quick; what a verb needs is imported when it runs.
"""
