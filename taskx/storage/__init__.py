"""Where tasks are kept: the interface, and the repositories that come with TaskX."""
