"""What runs tasks: executors, buffer, workers, scheduler, and the ledger through which they write."""
