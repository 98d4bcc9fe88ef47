"""What follows when a task moves, in one place, and the services that the parts of a queue share.

Each package above commits moves through it.
"""
