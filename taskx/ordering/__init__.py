"""Which tasks wait for others: for their parents, and for the turn of their concurrency key.

It reads and commits; it starts nothing.
"""
