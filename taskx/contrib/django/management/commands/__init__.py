"""The commands of this app for ``manage.py``.

There is one, ``taskx``, which has all others of TaskX inside.
"""
