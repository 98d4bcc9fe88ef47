"""Engines: what runs the tasks of a started queue, threads of this process or worker processes of a broker.

A program chooses the engine of a queue. :mod:`taskx.contrib` has engines for the brokers of others, which
only send tickets and hand them over. This package decides what a ticket starts, and when one is sent.
"""

from taskx.node.broker.base import BrokerEngine, check_queues
from taskx.node.broker.tickets import Ticket
from taskx.node.engine import Engine, Threads

__all__ = ["BrokerEngine", "Engine", "Threads", "Ticket", "check_queues"]
