"""Migrations of the tables of ``taskx.contrib.django``.

A released migration is never edited. A new one only adds, so that processes of the version before can still
write the outcomes of their tasks.
"""
