"""Bugs of policy for the simulator: old defects, moves with a weak guard, forgotten consequences."""

from contextlib import suppress
from typing import NamedTuple

import attrs

from taskx.attempt import waiting
from taskx.attempt.checkpoints import Checkpoints
from taskx.attempt.children import Children
from taskx.attempt.waiting import Waits
from taskx.node import schedules, starter
from taskx.node.admission import Admission, Asking, OwnSlots
from taskx.node.audit import Audit
from taskx.node.due import Release
from taskx.node.ordering import Dependents, Turns
from taskx.node.recovery import Recovery
from taskx.node.shared_limits import SharedBucket, SharedSlots
from taskx.node.starter import Starter
from taskx.node.ticker import Ticker
from taskx.queue.intake import Intake
from taskx.queue.operations import Operations
from taskx.stores import lists
from taskx.stores.liveness.leases import Leases
from taskx.tasks import children, ids, lifecycle, unique
from taskx.tasks.errors import RepositoryUnavailable
from taskx.tasks.rate import Rate


class Planted(NamedTuple):
    """A bug: what is wrong, how it gets there, a seed that finds it, and with which program.

    The seed is -1 if none is known that finds it.
    """

    text: str
    plant: object
    seed: int
    program: str


PLANTED = {}


def plant(text, *, seed, program="zoo"):
    def add(function):
        PLANTED[function.__name__] = Planted(text, function, seed, program)
        return function

    return add


def nothing(*args, **options):
    return None


def without(guard, *columns):
    return {name: value for name, value in guard.items() if name not in columns}


def around(patch, owner, name, change):
    """Replace a function by one that changes what it returns."""
    inner = getattr(owner, name)
    patch(owner, name, lambda *args, **options: change(inner(*args, **options)))


@plant("A start ignores the status.", seed=16)
def unguarded_start(patch):
    around(patch, lifecycle, "start_all", lambda made: [u and u._replace(guard={}) for u in made])


@plant("A start ignores the number of starts.", seed=207)
def start_without_starts(patch):
    def weak(made):
        return [u and u._replace(guard=without(u.guard, "starts")) for u in made]

    around(patch, lifecycle, "start_all", weak)


@plant("A start ignores what holds the task back.", seed=39)
def start_of_held(patch):
    def weak(made):
        return [u and u._replace(guard=without(u.guard, "held")) for u in made]

    around(patch, lifecycle, "start_all", weak)


@plant("An outcome ignores the number of starts.", seed=34)
def weak_fence(patch):
    around(patch, lifecycle, "_fence", lambda guard: without(guard, "starts"))


@plant("A retry ignores a cancel.", seed=172)
def retry_despite_cancel(patch):
    def weak(writes):
        return [writes[0]._replace(guard=without(writes[0].guard, "cancel_requested_at"))]

    around(patch, lifecycle, "_unless_cancelled", weak)


@plant("A task waits for one parent only.", seed=17)
def one_parent_is_enough(patch):
    inner = lifecycle.parents_moved

    def hasty(child, statuses, now):
        done = dict.fromkeys(child.depends_on, "completed")
        return inner(child, done if "completed" in statuses.values() else statuses, now)

    patch(lifecycle, "parents_moved", hasty)


@plant("A task starts after its parent failed.", seed=1569)
def failed_parent_at_submit(patch):
    patch(lifecycle, "next_parent", lifecycle.unfinished_parent)


@plant(
    "A dead node's dependents are forgotten.",
    seed=287,
    program="patient",
)
def dependents_of_the_dead(patch):
    patch(Dependents, "ended_elsewhere", nothing)
    patch(Dependents, "scan_some", nothing)


@plant(
    "A dead node's turn is forgotten.",
    seed=109,
    program="keyed",
)
def turns_of_the_dead(patch):
    patch(Turns, "scan_all_soon", nothing)
    patch(Turns, "scan_some", nothing)


@plant("The last task gets the turn.", seed=15)
def last_come_first_served(patch):
    def last(self, key, leaver=""):
        line = self._moves.repository.find("line", [key], ("id",))
        return [w for (task_id,) in line[-1:] for w in lifecycle.give_turn(task_id, key)]

    patch(Turns, "_next_turn", last)


@plant("A failed task keeps its turn.", seed=44)
def failure_keeps_turn(patch):
    inner = lifecycle._end

    def end(task, ending, now, status):
        made = inner(task, ending, now, status)
        return without(made, "turn") if status == "failed" else made

    patch(lifecycle, "_end", end)


@plant("A cancelled task keeps its turn.", seed=80)
def cancel_keeps_turn(patch):
    def keep(writes):
        return [write._replace(changes=without(write.changes, "turn")) for write in writes]

    around(patch, lifecycle, "_cancel_pending", keep)


def overwrite(self, text, value):
    """Change a note whatever others have stored meanwhile."""
    self._stale = True
    note = self._repository.notes(self._name).get(self._name)
    self._repository.put_note(self._name, text, note.version if note else 0)
    self._read()
    return True


@plant("Slots are changed without a comparison.", seed=30)
def slots_without_compare(patch):
    patch(SharedSlots, "_put", overwrite)


@plant("Tokens are changed without a comparison.", seed=267)
def tokens_without_compare(patch):
    patch(SharedBucket, "_put", overwrite)


@plant("Slots of dead nodes stay taken.", seed=7)
def slots_of_the_dead(patch):
    patch(SharedSlots, "_bury", nothing)


@plant("Slots of live nodes are freed.", seed=30)
def slots_of_the_living(patch):
    def bury(self):
        self._share_out({self._node: self._mine})

    patch(SharedSlots, "_bury", bury)


@plant("A failed start keeps its slot.", seed=18)
def slot_leaks(patch):
    inner = Admission.over
    patch(
        Admission, "over", lambda self, i, *, ran, **more: inner(self, i, ran=ran) if ran else None
    )


@plant("Slots are not counted.", seed=1144)
def endless_slots(patch):
    patch(OwnSlots, "take", lambda self, count: count)


@plant("A tick's task has a random id.", seed=0)
def random_tick(patch):
    patch(schedules, "tick_id", lambda name, tick: ids.new_id())


@plant("A schedule moves on too early.", seed=0)
def tick_before_task(patch):
    def run(self, due):
        plans = self._without_overlap(self._plans(due, self._now()))
        self._put(plans)
        now = self._clock.now_ms()
        inserts = [p.entry.insert(tick, now) for p in plans for tick in p.run]
        return bool(inserts) and any(self._moves.commit(inserts))

    patch(Ticker, "_run", run)


@plant("A tick ignores ``overlap``.", seed=3)
def overlapping_ticks(patch):
    patch(Ticker, "_may_run", lambda self, plan, statuses: True)


@plant("A start whose answer was lost counts as failed.", seed=39)
def start_in_doubt(patch):
    def give_up(self, runs, error):
        for run in runs:
            self.strike(run)

    patch(Starter, "give_up", give_up)
    patch(Audit, "_interrupt", nothing)


@plant("A dead node's buffer is forgotten.", seed=0)
def buffers_of_the_dead(patch):
    patch(Recovery, "go_on", lambda self, until=0: 0)


@plant("A task may crash once more.", seed=7)
def one_more_crash(patch):
    around(patch, lifecycle, "_crashes_allowed", lambda most: most + 1)


@plant("An expired task starts.", seed=19)
def late_start(patch):
    patch(lifecycle, "has_expired", lambda task, now: False)


@plant("A requeue forgets the unique key.", seed=676)
def key_not_taken_again(patch):
    patch(unique, "taken_again", lambda task: {})


@plant("Every start frees the unique key.", seed=11)
def key_freed_by_start(patch):
    patch(unique, "freed_by_start", lambda task: {"unique_lock": None})


@plant("Delayed tasks start five seconds early.", seed=9)
def early_release(patch):
    inner = Release._release_some
    patch(Release, "_release_some", lambda self, now: inner(self, now + 5000))
    patch(Release, "earliest", lambda self: (at := _earliest(self)) and at - 5000)


_earliest = Release.earliest


@plant('``on_parent_failure="fail"`` cancels.', seed=17)
def cancelled_with_parent(patch):
    def cancel(write):
        changes = write.changes
        return write._replace(
            changes={**changes, "status": "cancelled"} if changes.get("dead_letter") else changes
        )

    around(patch, lifecycle, "parents_moved", cancel)


@plant("A submit hides an error.", seed=26)
def accepted_not_stored(patch):
    inner = Intake._take_in

    def take_in(self, insert, *args, **options):
        with suppress(RepositoryUnavailable):
            return inner(self, insert, *args, **options)
        return insert.id

    patch(Intake, "_take_in", take_in)


@plant(
    "A rescue takes what another node has rescued, and a third one runs, in the meantime.",
    seed=-1,
)
def rescue_from_the_living(patch):
    def take_back(self, node):
        repository = self._pool.moves.repository
        find = repository.find
        running = [task_id for (task_id,) in find("running_on", [node.id], ("id",))]
        tasks = list(repository.get_many(running).values())
        if not repository.liveness.is_dead(node.id):
            return 0
        if tasks:
            self._rescue(node, tasks)
        self._left[node.id] = 0
        return len(running)

    patch(Recovery, "_take_back", take_back)


@plant(
    "A task is released at an old time.",
    seed=11079,
    program="delayed",
)
def release_of_replaced(patch):
    inner = lifecycle.release
    patch(lifecycle, "release", lambda task_id, run_at: inner(task_id))


@plant("A token that was not used is put back however late.", seed=-1, program="rated")
def late_token(patch):
    patch(Rate, "put_back", lambda self, mark, count, age=0.0: mark - count * self.interval)


@plant("An early answer is lost.", seed=0, program="patient")
def early_answer_lost(patch):
    patch(lifecycle, "created_finished", lambda insert, finish: lifecycle.opened(insert))


@plant("A second answer counts.", seed=7, program="patient")
def second_answer_counts(patch):
    inner = Operations._answer

    def unfinished(self, answer_id):
        found, on = inner(self, answer_id)
        return found and attrs.evolve(found, status="pending"), on

    patch(Operations, "_answer", unfinished)
    around(patch, lifecycle, "finish", lambda write: write._replace(guard={}))


@plant("The end of a sleep is not stored.", seed=3, program="patient")
def sleep_forgotten(patch):
    inner = Checkpoints.seal
    patch(Checkpoints, "seal", lambda self, parked: inner(self, parked)._replace(checkpoints=None))


@plant("A wait counts as an interruption.", seed=0, program="patient")
def wait_is_interruption(patch):
    def count(writes):
        changes = {**writes[0].changes, "interruptions": 1}
        return [writes[0]._replace(changes=changes), *writes[1:]]

    around(patch, lifecycle, "_park", count)


@plant("A waiting task gives its turn away.", seed=9, program="patient")
def wait_without_turn(patch):
    def give_away(writes):
        changes = {**writes[0].changes, "turn": None}
        return [writes[0]._replace(changes=changes), *writes[1:]]

    around(patch, lifecycle, "_park", give_away)


@plant("Going on after a wait leaks a slot.", seed=30, program="patient")
def wait_keeps_slot(patch):
    inner = Admission.over

    def over(self, task_id, *, ran, **more):
        if not (ran and self._repository.find("id", [task_id], ("waiting_on",))[0][0]):
            inner(self, task_id, ran=ran, **more)

    patch(Admission, "over", over)


@plant("Open answers outlive their task.", seed=13, program="patient")
def open_answers_left(patch):
    inner = lifecycle.moved_on

    def leave(task, *args):
        return [] if task.type == lifecycle.ANSWER else inner(task, *args)

    patch(lifecycle, "moved_on", leave)


@plant("An answer misses a new wait.", seed=18, program="patient")
def answer_between(patch):
    patch(Dependents, "waits", lambda self, waiting: setattr(self, "any", True))
    patch(Dependents, "scan_some", nothing)
    patch(Dependents, "ended_elsewhere", nothing)


@plant("``ctx.once`` notes nothing before the call.", seed=3, program="patient")
def once_not_noted(patch):
    inner = Checkpoints._put

    def put(self, name, value, token, *, durable):
        if value != waiting.begun():
            inner(self, name, value, token, durable=durable)

    patch(Checkpoints, "_put", put)


@plant("A waiting task survives its cancel.", seed=208, program="patient")
def cancelled_goes_on(patch):
    def weak(writes):
        return [writes[0]._replace(guard=without(writes[0].guard, "cancel_requested_at"))]

    around(patch, lifecycle, "_park", weak)


@plant("A parent waits for one child only.", seed=3, program="family")
def one_child_is_enough(patch):
    patch(children, "awaited", lambda listed, statuses: _first_unfinished(listed, statuses))


def _first_unfinished(listed, statuses):
    unfinished = [one for one in listed.depends_on if statuses.get(one) in ("pending", "running")]
    return unfinished[0] if len(unfinished) == len(listed.depends_on) else None


@plant("The next step ignores a fork.", seed=10, program="family")
def fork_without_dependents(patch):
    patch(Children, "_late_dependents", lambda self, parent, ids: [])


@plant("A key has a turn too many.", seed=47, program="keyed")
def one_more_turn(patch):
    around(patch, lifecycle, "turns_at_once", lambda number: number + 1)


@plant("A start takes no token of its key.", seed=3, program="keyed")
def key_without_rate(patch):
    patch(Starter, "_may_refuse", lambda self, key, *more: False)


@plant("Each node counts a key's rate alone.", seed=3, program="keyed")
def key_rate_of_node(patch):
    inner = Admission._bucket

    def own(self, name, limit, before):
        limit = limit._replace(scope="node")
        return self.__dict__.setdefault("own", {}).setdefault(
            name, inner(self, name, limit, before)
        )

    patch(Admission, "_bucket", own)


@plant("Every start costs one token.", seed=3, program="keyed")
def cost_not_taken(patch):
    patch(Rate, "share", lambda self, cost: 1 if cost or not self.unit else 0)


@plant("Children survive the cancel of their parent.", seed=29, program="family")
def children_of_cancelled(patch):
    inner = lists.cancel

    def cancel(repository, commit, listed, now):
        if repository.get_by_id(listed.params["parent"]).status.value != "cancelled":
            inner(repository, commit, listed, now)

    patch(lists, "cancel", cancel)


@plant("Children that nobody needs go on.", seed=7, program="family")
def children_not_needed(patch):
    inner = Children.outcomes
    patch(
        Children,
        "outcomes",
        lambda self, parent, name, some, *more: inner(self, parent, name, False, *more),
    )


@plant("Children do not run again with their parent.", seed=-1, program="family")
def children_not_again(patch):
    def reopen(self, listed, parent):
        self._moves.commit([lifecycle.listed_again(listed, parent.id)])

    patch(Children, "_reopen", reopen)


@plant("Going on after a wait takes a token.", seed=7, program="rated")
def token_to_go_on(patch):
    patch(starter, "Asking", lambda task_id, cost, resumed: Asking(task_id, cost, False))


@plant("An interruption restarts a wait's time-out.", seed=13, program="patient")
def time_out_anew(patch):
    inner = Waits.wait

    def wait(self, task, awaited, timeout, until, token):
        return inner(self, task, awaited, timeout, None, token)

    patch(Waits, "wait", wait)


@plant("A lone node that seems dead stays dead.", seed=896)
def alone_and_dead(patch):
    patch(Leases, "come_back", nothing)
