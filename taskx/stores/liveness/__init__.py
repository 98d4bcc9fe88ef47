"""Nodes and their liveness, with one strategy for each kind of store.

A repository creates the strategy that its store supports, and offers it as ``repository.liveness``. All
other code uses nodes only through it. This package works on notes and does not depend on a repository.
"""
