"""The kill campaign: processes that share a store are killed at random, and a proof checks the result."""
