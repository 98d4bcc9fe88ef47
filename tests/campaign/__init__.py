"""Processes on one file that are killed at every moment, and the proof that nothing went wrong."""
