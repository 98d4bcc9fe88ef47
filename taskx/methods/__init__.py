"""The methods of a queue that ask and that steer, by subject.

They hold no rules: each calls the function that does the work. ``Queue`` inherits them, and nothing else
uses them.
"""
