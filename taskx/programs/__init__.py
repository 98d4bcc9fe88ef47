"""Programs around a queue: the command line, the processes of ``taskx worker``, the dashboard.

They hold no rules about tasks: they call public methods of ``Queue``. Each needs packages of its own, which
are imported at first use.
"""
