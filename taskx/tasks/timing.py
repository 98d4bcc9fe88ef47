"""The intervals, time-outs and batch sizes of TaskX's own work, in one place."""

from __future__ import annotations

import attrs


# attrs takes milliseconds to make methods of so many fields: those that nobody needs are left out.
@attrs.frozen(kw_only=True, eq=False, repr=False)
class Timing:
    """The intervals, the longest waits and the batch sizes of the parts of TaskX.

    These are no settings: programs use the defaults. Tests pass other values to a repository or a queue.
    All times are in seconds. The names say what a number is: ``…_every`` is the interval of a step that is
    repeated, ``…_within`` and ``longest_…`` are the most that may pass, ``…_after`` is the age from which
    something counts as old, and ``…_batch`` and ``most_…`` are numbers of items.
    """

    # --- to notice what other processes do

    #: Between polls of a node for changes. The rests between wake-ups need not be longer.
    poll_every: float = 0.09
    #: Between checks for dead nodes, and between the rounds of an idle housekeeper. Observers of leases
    #: poll as often.
    recover_every: float = 0.5
    #: Between audits of a node's own tasks: they find whatever no event has reported.
    audit_every: float = 2.0
    #: Between writes of progress, and between the reports of a child process to its parent.
    progress_every: float = 0.1
    #: Between polls of a process in which no queue is started, while it waits for tasks.
    watch_every: float = 0.02
    #: Between polls of a waiting thread, in case the thread that should wake it is gone.
    handles_every: float = 1.0
    #: Between polls of a waiting thread, in case a signal has lost its wake-up.
    signals_every: float = 0.5
    #: Between polls for the answer of a node that was asked for something.
    answer_every: float = 0.05
    #: Age of the requests and answers that are removed, as their processes left them behind.
    forget_requests_after: float = 600.0
    #: Between two checks by one thread that wake-ups cause: all in this time lead to one check.
    shortest_rest: float = 0.002
    #: The time without a check after which a thread that others wake rests no longer.
    rest_within: float = 1.0
    #: The time for which a repository may not answer before it counts as away.
    answer_within: float = 5.0

    # --- the housekeeper

    #: The length of a round. A duty that has more to do takes one more step, of some milliseconds, and
    #: leaves the rest to the next round, which follows at once.
    round_within: float = 0.01
    #: The shortest sleep between two rounds.
    shortest_sleep: float = 0.001
    #: The longest pause of a thread of a node that tries again while the repository or broker fails.
    longest_pause: float = 2.0
    #: Tasks that are read at a time, or changed or removed in one transaction, for which other writers wait
    #: some milliseconds; and schedules that are read in one page.
    batch: int = 200
    #: Delayed tasks that are released in one transaction.
    due_batch: int = 500
    #: Tasks in a buffer that are freed in one transaction.
    free_batch: int = 1000
    #: Tasks that are requeued in one transaction: a page, and the tasks that ended because of it.
    requeue_batch: int = 1000
    #: Values that are read in each step of a scan: parents, types, schedules.
    scan_batch: int = 1000
    #: Tasks that one audit compares: the running ones, and the next ones in the buffer.
    most_audited: int = 5000
    #: Between two times at which what was counted is added up, ...
    gather_every: float = 1.0
    #: ... and between two commits that store it, or after so many tasks.
    count_every: float = 5.0
    most_uncounted: int = 100
    #: Between scans for tasks whose retention period is over, and for counts that can be added up.
    retention_every: float = 60.0

    # --- schedules

    #: Between polls for schedules that another process changed; with very many schedules, less often, ...
    schedules_every: float = 1.0
    #: ... but at least this often. It is well below ``longest_gap``, so that the ticks of a new schedule do
    #: not count as missed.
    longest_schedules_every: float = 5.0
    #: Schedules, or ticks that get their tasks, in one step: some milliseconds of work.
    tick_batch: int = 100
    #: The most time between two rounds that succeed. After a longer gap the ticks in between were missed:
    #: the process, the machine or the repository was stopped, or the clock was set.
    longest_gap: float = 10.0
    #: The longest pause before a schedule whose tasks could not be made is tried again.
    longest_schedule_pause: float = 60.0

    # --- workers

    #: A task is short if it takes less time than this.
    short_task: float = 0.0002
    #: Tasks started in one transaction while tasks are short.
    most_ahead: int = 128
    #: The time for which a worker lets short tasks gather when they arrive in quick succession.
    gather: float = 0.004
    #: The time that a task started ahead waits for a free worker before it is handed back.
    hand_back_after: float = 0.005
    #: The time after which a worker's current task counts as long.
    tied_up_after: float = 0.002
    #: Waiting workers that one start serves. Tasks that start together end together, and their workers then
    #: wait together again. In small portions, the workers drift apart and block one another less.
    most_served: int = 5
    #: The time that a task on its last chance waits for the others to end, and that others wait for it.
    alone_within: float = 60.0
    #: Runs that are remembered as unexecuted, if the repository fails for long.
    most_unexecuted: int = 250
    #: The first pause of a worker after an error of the repository.
    worker_pause: float = 0.05
    #: The extra grace period of a run in a child process: the child is killed, which frees the thread.
    kill_within: float = 10.0

    # --- executors

    #: Between readings of the injected clock, which a test may move, for the time-outs of tasks.
    alarms_every: float = 0.05
    #: Between two tries to store a task whose unique key is passed from task to task.
    unique_every: float = 0.01
    #: Between two tries of an executor to store something while the repository is unavailable.
    retry_every: float = 0.2
    #: Between two checks of a child process: has the token fired, has the child ended without a message?
    child_every: float = 0.1

    # --- commits

    #: Entries of one transaction, so that a long queue does not become one long lock.
    commit_batch: int = 256
    #: Between two checks of a thread that waits for a commit: the thread that should wake it may have been
    #: interrupted.
    follower_every: float = 0.05
    #: The first pause before a write that another transaction has locked is tried again; each further one
    #: is twice as long, ...
    lock_pause: float = 0.1
    #: ... up to this.
    longest_lock_pause: float = 1.0

    # --- hooks and displays

    #: Waiting events from which the threads that cause more events are slowed down.
    most_events: int = 10_000
    #: The longest delay of such a thread: a hook that hangs must not stop the queue.
    hold_within: float = 1.0
    #: The time for which a thread that has nothing to do waits for something before it ends.
    keep_thread: float = 2.0
    #: Between two states of a task in a display.
    display_every: float = 0.2
    #: Between two states of a whole queue in a display, which reads more.
    follow_every: float = 0.5
    #: Between two states of a bar, and between two lines if nothing can be redrawn.
    bar_every: float = 0.1
    line_every: float = 5.0

    # --- the end

    #: Between polls of a thread that waits until the node is quiet.
    quiet_every: float = 0.1
    #: The time for which a coroutine may keep the others from going on, without a warning.
    loop_blocked_after: float = 1.0
    #: The time that a thread of the node may take to end.
    join_thread_within: float = 5.0
    #: The time that a stop may take beyond its time-out, if the repository or a hook hangs.
    stop_extra: float = 1.0
    #: The time-out of a stop that another process has caused: by a request, or a migration.
    retire_within: float = 30.0
    #: The time-out of the stop after a second signal.
    at_once_within: float = 1.0
    #: The time that a queue which was not stopped gets at interpreter exit to hand its tasks back.
    exit_within: float = 5.0
    #: The time that the end of a watcher may take: until then all waiting threads are told.
    close_within: float = 1.0

    # --- answers to questions about a queue

    #: Tasks of one kind that are read to explain something: parents, tasks that come first, failures.
    most_explained: int = 1000
    #: Newest tasks, of a status if the filter has one, among which a page searches in params.
    most_searched: int = 100_000
    #: Tasks of a flow that a list of flows counts.
    most_of_flow: int = 5_000
    #: Changes that are kept. Some more are stored until a write removes the oldest ones.
    most_changes: int = 1_000

    # --- the dashboard

    #: The time after which a request makes no further batch of changes.
    request_within: float = 5.0
    #: Between looks of a stream of changes.
    stream_every: float = 0.5
    #: The longest time for which a stream sends no line.
    silence_within: float = 5.0

    # --- leases

    #: Heartbeats in a lease.
    lease_beats: float = 10
    #: The part of a lease that is its margin: a node gives up its lease so long before others take over.
    lease_margin: float = 0.2
    #: Heartbeats that a live node misses before it counts as late.
    lease_late: float = 3
    #: The age of a heartbeat, in leases, at which it leaves open if its node lives. Clocks that differ by
    #: less than one lease raise no alarm.
    lease_silent: float = 2
    #: The time that a new node waits for a process that locked its file to check if it is an orphan.
    orphan_within: float = 1.0

    # --- stores

    #: The time that a fork waits for other threads' transactions to end.
    fork_within: float = 5.0
    #: Between looks at an open transaction of a caller: the shortest and the longest time.
    transaction_every: float = 0.001
    longest_transaction_every: float = 0.01
    #: Between looks at them while none has writes that wait for its end.
    idle_transactions_every: float = 0.25
    #: The age at which a transaction that seems to be open is looked up, and the longest time between two
    #: look-ups. Its connection may be in the next transaction already.
    look_up_after: float = 0.02
    longest_look_up_every: float = 1.0
    #: The time for which a transaction that has ended is looked up: it may look ended before its commit is
    #: seen.
    commit_within: float = 1.0

    # --- SQLite

    #: Connections that read at once; further threads wait. Each connection has two open files.
    most_readers: int = 16
    #: The time after which an unused connection is closed.
    close_reader_after: float = 10.0
    #: Between tries of a thread that waits for a connection: first, and at most.
    reader_pause: float = 0.001
    longest_reader_pause: float = 0.05
    #: The time for which a process may write before it queues again behind other writing processes.
    turn: float = 0.002
    #: Between tries of the next process for its turn, and between tries of those behind it for a place.
    turn_pause: float = 0.00025
    place_pause: float = 0.0015
    #: Between tries to begin a transaction in an application's file: first, and at most.
    begin_pause: float = 0.0001
    longest_begin_pause: float = 0.001
    #: Waits shorter than this are not deducted from the time-out of a write.
    short_wait: float = 0.05
    #: The time for which others may hold the lock of a file that counts as free.
    file_free_within: float = 0.05
    #: Between scans of the folder for the pipes of other processes.
    listeners_every: float = 0.01
    #: The time that the check of the contents, and the wait for the write lock, may take.
    examine_within: float = 2.0

    # --- MongoDB

    #: The time that the server waits for a change before it answers that there is none.
    change_within: float = 1.0
    #: Between an answer without changes and the next request.
    change_every: float = 0.02
    #: The time without an answer after which a change stream counts as broken.
    stream_broken_after: float = 3.0
    #: The time after which a change stream that nobody asks for is closed.
    close_stream_after: float = 60.0
    #: The pause before a broken change stream is opened again: first, and at most.
    stream_pause: float = 0.5
    longest_stream_pause: float = 10.0
    #: Between two tries to send a write or to commit.
    send_every: float = 0.05
    #: The time that another task waits for a batch to be committed before it abandons the batch.
    abandon_after: float = 1.0
    #: The time that an abort may take: the server also aborts by itself.
    abort_within: float = 1.0
    #: Between readings of the server's clock, and the time-out of one.
    server_clock_every: float = 600.0
    server_clock_within: float = 1.0

    # --- PostgreSQL

    #: Between two messages with news of a process.
    news_every: float = 0.02
    #: The time after which the connection that hears news is closed, and another one opened.
    renew_listener_after: float = 600.0
    #: Between looks at the commits of others while news are heard.
    read_commits_every: float = 1.0

    # --- databases of Django

    #: The idleness after which a connection is checked before its next use.
    check_connection_after: float = 1.0

    # --- the supervisor of worker processes

    #: The longest sleep of the supervisor.
    supervise_every: float = 1.0
    #: Between beats of a process, and between its checks until its queue has started.
    beat_every: float = 1.0
    start_check_every: float = 0.02
    #: The time without a beat after which a process counts as not healthy.
    beat_within: float = 30.0
    #: The age at which a process that dies is replaced at once, and not after a back-off.
    proven_after: float = 60.0
    #: The longest wait before a process is started again.
    longest_restart_pause: float = 30.0
    #: The time that a process has to end after its stop time-out, before it is killed.
    end_within: float = 5.0
    #: The time that the end of the interpreter may take, after the queue has stopped.
    leave_within: float = 10.0
    #: Between writes of the health file.
    health_every: float = 5.0
    #: The age at which a report is too old: the supervisor itself hangs.
    report_within: float = 15.0
    #: The time that a client of the health port may take to send its request.
    probe_within: float = 5.0

    # --- engines with a broker

    #: Between looks at the store for tickets to send: the least while many are used, and the most.
    tickets_every: float = 0.01
    longest_tickets_every: float = 0.5
    #: The age at which the list of nodes is read again.
    crew_every: float = 0.5
    #: The time for which a node leaves free tasks to the nodes that come first.
    leave_tasks: float = 1.0
    #: The longest wait before a ticket is sent once more.
    longest_resend: float = 60.0
    #: The first pause after an error of the repository or the broker.
    broker_pause: float = 0.1
    #: The pause of a worker process that could not start its queue before it tries again: first, and at
    #: most.
    join_pause: float = 0.5
    longest_join_pause: float = 10.0
    #: The time for which a ticket waits for the queue of a worker process that is starting.
    join_within: float = 5.0
    #: The time after which a ticket goes back that only other workers can use: the first of a type, and at
    #: most. It doubles, because such tickets may go round while the workers that can use them are busy.
    elsewhere_after: float = 0.05
    longest_elsewhere_after: float = 0.5
    #: The time for which a process that cannot run tasks keeps each ticket: others get more of them.
    keep_ticket: float = 0.2
    #: The time for which a ticket waits for a free thread. RabbitMQ closes the channel of a message that is
    #: held for half an hour, and as many messages again wait behind it.
    ticket_within: float = 60.0


#: The timing of everything to which no other is given.
DEFAULT_TIMING = Timing()
