"""Which nodes are there, and which of them live; a strategy of its own for each kind of store.

A repository makes the strategy that its store allows, and offers it as ``repository.liveness``; what needs
nodes uses that alone. Everything here works on notes, and knows no repository.
"""
