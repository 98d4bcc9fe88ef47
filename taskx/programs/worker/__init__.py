"""The program that runs a queue in several processes: ``taskx worker`` without its command line.

``supervisor`` starts and replaces processes by the rules in ``fleet``. Each of them runs ``process``: a
fresh interpreter that loads the queue, runs it until it is told to stop, and reports to the supervisor.
"""
