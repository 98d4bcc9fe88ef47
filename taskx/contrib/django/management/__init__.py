"""What ``manage.py`` finds in this app.

Django looks for commands in the package ``commands``.
"""
