"""The commands of ``manage.py`` that this app adds.

Django looks for commands in the package ``commands``.
"""
