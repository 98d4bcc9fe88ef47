"""The forms of the admin. A queue checks their values, so a form accepts the same values as a program."""

from __future__ import annotations

import json
import re
from typing import Any

import attrs
from django import forms

from taskx.attempt.waiting import ONCE
from taskx.contrib.django.models import Schedule
from taskx.node.schedules import OVERLAPS
from taskx.queue.queue import Queue
from taskx.tasks.clock import LAST
from taskx.tasks.errors import ConfigurationError, PayloadError, TaskxError, UnknownTaskType
from taskx.tasks.model import Task
from taskx.tasks.redact import redacted, unhidden
from taskx.tasks.ticks import MISFIRES, Every, every

_INTERVAL = re.compile(r"every\s+(\d+(?:\.\d+)?)\s*([smhd]?)\Z")
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class ParamsField(forms.JSONField):
    """Params: a JSON object."""

    def __init__(self, **options: Any) -> None:
        # An empty object is valid, but Django treats it as no value.
        super().__init__(required=False, widget=forms.Textarea({"rows": 12, "cols": 80}), **options)

    def prepare_value(self, value: Any) -> Any:
        """Return the text for the page; one that was sent already stays as it is."""
        return value if isinstance(value, str) else _indented(value)

    def bound_data(self, data: Any, initial: Any) -> Any:
        """Return the text that was sent as it is: its values may be such as no page can show."""
        return data

    def to_python(self, value: Any) -> Any:
        """Return the JSON value of a text. Raises ValidationError if it has none that Python can hold."""
        try:
            return super().to_python(value)
        except (RecursionError, ValueError) as error:
            raise forms.ValidationError(f"Params cannot be read: {error}.") from error

    def clean(self, value: Any) -> dict[str, Any]:
        """Return the params. Raises ValidationError for a text that is no JSON object."""
        params = super().clean(value)
        if params is None:
            return {}
        if not isinstance(params, dict):
            raise forms.ValidationError(
                "Params must be a JSON object, such as {} or {“to”: “ann”}."
            )
        return params


def _indented(value: Any) -> str:
    return json.dumps({} if value is None else value, indent=2, ensure_ascii=False)


class RequeueForm(forms.Form):
    """The form that runs a failed or cancelled task again, with other params.

    Args:
        queue: the queue of the task.
        task: the task.
    """

    params = ParamsField(
        help_text="A value that is shown as *** stays as it is, unless you write another one."
    )

    def __init__(self, queue: Queue, task: Task, *args: Any, **options: Any) -> None:
        self._queue, self._task = queue, task
        shown = redacted(task.params, queue.config.redact)
        super().__init__(*args, initial={"params": shown}, **options)

    def clean(self) -> None:
        """Requeue the task. What the queue refuses is an error of the form."""
        if self.errors:
            return
        params = unhidden(self.cleaned_data["params"], self._task.params)
        try:
            self._queue.requeue(self._task.id, params=params if self._changes(params) else None)
        except PayloadError as error:
            self.add_error("params", str(error))
        except TaskxError as error:
            self.add_error(None, str(error))

    def _changes(self, params: Any) -> bool:
        changed: bool = params != self._task.params
        return changed


class AnswerForm(forms.Form):
    """The form that gives an answer for which a task waits.

    Args:
        queue: the queue of the answer.
        task: the answer.
        by: the name of the user.
    """

    value = forms.CharField(
        label="Answer", required=False, strip=False, widget=forms.Textarea({"rows": 4, "cols": 80})
    )

    def __init__(self, queue: Queue, task: Task, by: str, *args: Any, **options: Any) -> None:
        self._queue, self._task, self._by = queue, task, by
        super().__init__(*args, **options)
        kinds = [("text", "a text"), ("json", "JSON"), ("error", "an error")]
        if ONCE in task.params:  # a call with an unknown outcome
            kinds.append(("again", "it was not done: do it again"))
        self.fields["kind"] = forms.ChoiceField(label="It is", choices=kinds)

    def clean(self) -> None:
        """Give the answer. What the queue refuses is an error of the form."""
        if self.errors:
            return
        try:
            if not self._queue.finish(self._task.id, by=self._by, **self._given()):
                self.add_error(None, "The answer was given before, or has ended.")
        except TaskxError as error:
            self.add_error(None, str(error))

    def _given(self) -> dict[str, Any]:
        kind, text = self.cleaned_data["kind"], self.cleaned_data["value"].replace("\r\n", "\n")
        if kind == "again":
            return {"again": True}
        if not text.strip():
            raise forms.ValidationError({"value": "The answer is empty."})
        if kind == "error":
            return {"error": text}
        try:
            return {"result": json.loads(text) if kind == "json" else text}
        except (ValueError, RecursionError) as error:
            raise forms.ValidationError({"value": f"The answer is not JSON: {error}."}) from None


class ScheduleForm(forms.ModelForm):
    """A schedule, as ``Queue.schedule`` takes it.

    ``ScheduleAdmin`` sets ``queue``, and the ``schedule`` that is edited.
    """

    queue: Queue
    schedule: Any = None

    name = forms.CharField(max_length=200)
    spec = forms.CharField(
        label="Times",
        help_text="A cron expression of five fields, such as 0 3 * * *, or an interval, such as "
        "every 90 s, every 15 m, every 2 h or every 1 d.",
    )
    tz = forms.CharField(
        label="Time zone",
        required=False,
        help_text="Of a cron expression, such as Europe/Berlin; UTC if it is empty.",
    )
    type = forms.CharField(help_text="The type of its tasks, such as shop.tasks.report.")
    params = ParamsField()
    priority = forms.IntegerField(required=False, help_text="Higher numbers run first.")
    tags = forms.CharField(required=False, help_text="Separated by spaces.")
    expires = forms.FloatField(
        label="Expires after",
        max_value=LAST // 1000,
        required=False,
        help_text="Seconds from a tick after which its task is cancelled if it has not started.",
    )
    misfire = forms.ChoiceField(
        label="Missed ticks",
        choices=[(one, one) for one in ("one", *(name for name in MISFIRES if name != "one"))],
        help_text="Ticks that came while nothing was running get one task together, none (skip), or each "
        "its own (all).",
    )
    misfire_grace = forms.FloatField(
        label="At most late",
        max_value=LAST // 1000,
        required=False,
        help_text="Seconds that a tick may be late and still get a task; needed for all.",
    )
    overlap = forms.ChoiceField(
        choices=[(one, one) for one in OVERLAPS],
        help_text="skip: a tick gets no task while the task of an earlier one has not ended.",
    )
    paused = forms.BooleanField(required=False)

    class Meta:
        model = Schedule
        fields: tuple[str, ...] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.schedule is not None:
            self.initial.update(_shown(self.schedule, self.queue.config.redact))
            self.fields["name"].disabled = True

    def clean(self) -> dict[str, Any]:
        """Declare the schedule. What the queue refuses is an error of the form, and nothing is stored."""
        given: dict[str, Any] = super().clean() or self.cleaned_data
        if self.errors:
            return given
        name = given["name"]
        if self.schedule is None and name in self.queue.schedules():
            self.add_error("name", "There is a schedule with this name: change that one.")
            return given
        try:
            self._declare(given)
        except TaskxError as error:
            self.add_error(_field_of(error), str(error))
        return given

    def _post_clean(self) -> None:
        """Name the row. Nothing is left to check, because the queue has stored it."""
        self.instance.name = Schedule.note_of(self.cleaned_data.get("name", ""))

    def _declare(self, given: dict[str, Any]) -> None:
        old = Task() if self.schedule is None else self.schedule.task
        model = attrs.evolve(
            old,
            type=given["type"],
            params=unhidden(given["params"], old.params),
            tags=given["tags"].split(),
            priority=given["priority"] or 0,
        )
        declared = self.queue.schedule(
            given["name"],
            _spec(given["spec"]),
            model,
            tz=given["tz"] or None,
            misfire=given["misfire"],
            misfire_grace=given["misfire_grace"],
            overlap=given["overlap"],
            expires=given["expires"],
        )
        declared.store()
        if given["paused"] != declared.paused:
            (declared.pause if given["paused"] else declared.resume)()


def _spec(text: str) -> str | Every:
    found = _INTERVAL.match(text.strip())
    return text if found is None else every(float(found[1]) * _SECONDS[found[2]])


def _shown(schedule: Any, redact: tuple[str, ...]) -> dict[str, Any]:
    task = schedule.task
    return {
        "name": schedule.name,
        "spec": str(schedule.spec),
        "tz": "" if isinstance(schedule.spec, Every) else schedule.tz,
        "type": schedule.type,
        "params": redacted(schedule.params, redact),
        "priority": task.priority,
        "tags": " ".join(task.tags),
        "expires": schedule.expires,
        "misfire": schedule.misfire,
        "misfire_grace": schedule.misfire_grace,
        "overlap": schedule.overlap,
        "paused": schedule.paused,
    }


# The words by which an error of the queue begins, and the field that it is about.
_ABOUT = {
    "cron expression": "spec",
    "a schedule takes": "spec",
    "an interval": "spec",
    "unknown time zone": "tz",
    "tz": "tz",
    "misfire_grace": "misfire_grace",
    "misfire": "misfire_grace",
    "name": "name",
    "the name": "name",
    "a tag": "tags",
    "tag": "tags",
    "type": "type",
    "priority": "priority",
    "expires": "expires",
}


def _field_of(error: TaskxError) -> str | None:
    """Return the field that an error is about; None for the whole form."""
    if isinstance(error, PayloadError):
        return "params"
    if isinstance(error, UnknownTaskType):
        return "type"
    if isinstance(error, ConfigurationError):
        text = str(error)
        return next((field for words, field in _ABOUT.items() if text.startswith(words)), None)
    return None
