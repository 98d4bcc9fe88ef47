"""The task: its record, the moves it can make, its options, and the rules of JSON, time and errors.

Nothing here needs a store or a started queue, and all other rooms may import it. ``lifecycle`` is the only
module that knows how a move changes a record.
"""
