"""The bottom layer: what a task is, how it lives, and the rules that need no thread and no store."""
