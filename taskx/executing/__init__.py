"""One call of an executor: its registration and options, its context, and how it ended.

It knows neither worker threads nor what is stored; checkpoints alone commit through the ledger. The
packages that run and submit tasks use it.
"""
