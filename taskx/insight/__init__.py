"""Questions that a queue answers: why a task waits, what is wrong, how much work there is.

The answers are data with a sentence for people. A question changes no task, and its cost does not depend on
the number of tasks.
"""
