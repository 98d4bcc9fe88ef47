"""Codecs: they convert the JSON of a task before it is stored, to compress or encrypt it.

A codec's output is stored as a JSON object, ``{"taskx:codec": name, "data": base64}``. The columns thus
contain valid JSON for every program that reads the records.
"""

from __future__ import annotations

import base64
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from taskx.tasks import payload
from taskx.tasks.checks import check_int
from taskx.tasks.errors import ConfigurationError, PayloadError, is_interrupt
from taskx.tasks.model import check_name
from taskx.tasks.payload import CODEC_KEY
from taskx.tasks.writes import Insert, Update, Write

#: The columns that codecs convert.
CODED = ("params", "result", "checkpoints")

_PREFIX = f'{{"{CODEC_KEY}":'


class Codec(ABC):
    """A conversion of the params, results and checkpoints of tasks for storage, and back.

    Several threads call the methods. An exception from either method affects only the task at hand, even
    if it is not derived from ``Exception``, such as the panic of an extension in Rust.

    Attributes:
        name: stored in each record to say which codec wrote it. Never reuse it for another codec.
    """

    name: str

    @abstractmethod
    def encode(self, data: bytes) -> bytes | None:
        """Return the bytes to store for this JSON text (UTF-8), or None to store the text unchanged."""

    @abstractmethod
    def decode(self, data: bytes) -> bytes:
        """Return the JSON text (UTF-8) for bytes that :meth:`encode` returned."""


class ZlibCodec(Codec):
    """A codec that compresses values with zlib if that makes them smaller.

    Args:
        min_size: values smaller than this number of bytes are stored unchanged.
        level: from 1 (fastest) to 9 (smallest).

    Raises:
        ConfigurationError: an argument is not valid.
    """

    name = "zlib"

    def __init__(self, min_size: int = 1000, level: int = 6) -> None:
        self._min_size = check_int(min_size, "min_size", 0)
        self._level = check_int(level, "level", 1, 9)

    def encode(self, data: bytes) -> bytes | None:
        if len(data) < self._min_size:
            return None
        packed = zlib.compress(data, self._level)
        # The output is stored as base64, which makes it a third longer.
        return packed if len(packed) * 4 // 3 < len(data) else None

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data)


class Unreadable(ValueError):
    """A codec's output cannot be read."""


class Codecs:
    """The codecs of a repository. The first one writes; all of them read."""

    def __init__(self, given: Codec | Iterable[Codec] | None = None) -> None:
        several = isinstance(given, Iterable) and not isinstance(given, str)
        codecs: list[Any] = [] if given is None else list(given) if several else [given]  # type: ignore[arg-type]
        for codec in codecs:
            if not isinstance(codec, Codec):
                raise ConfigurationError(f"a codec must be an instance of Codec, not {codec!r}")
            if not check_name(getattr(codec, "name", None), "the name of a codec"):
                raise ConfigurationError(f"{codec!r} must have a name that is not empty")
        self._by_name = {codec.name: codec for codec in codecs}
        if len(self._by_name) < len(codecs):
            raise ConfigurationError("two codecs have the same name; each name must be unique")
        self._writer = codecs[0] if codecs else None
        #: True if there is a codec.
        self.given = bool(codecs)

    # --- writing

    def coded(self, writes: Sequence[Write]) -> Sequence[Write]:
        """Return the writes with encoded columns. Raises ``PayloadError`` if the codec fails."""
        return writes if self._writer is None else [self._coded_write(write) for write in writes]

    def _coded_write(self, write: Write) -> Write:
        if isinstance(write, Insert):
            return write._replace(row=dict(self.columns(write.row)))
        if isinstance(write, Update):
            return write._replace(changes=self.columns(write.changes))
        return write

    def columns(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns of a row, encoded for storage. Raises ``PayloadError`` if the codec fails."""
        if self._writer is None:
            return columns
        changed = {
            name: self._encode(name, columns[name])
            for name in CODED
            if columns.get(name) not in (None, "{}")
        }
        attempts = columns.get(ATTEMPTS)
        if attempts and _has_old_params(attempts):
            changed[ATTEMPTS] = _with_old_params(attempts, partial(self._encode, "params"))
        return {**columns, **changed} if changed else columns

    def _encode(self, column: str, text: str) -> str:
        codec = self._writer
        assert codec is not None  # the callers check it
        if text.startswith(_PREFIX):  # old params that this process could not read
            return text
        try:
            data = codec.encode(text.encode())
            if data is None:
                return text
            stored = base64.b64encode(data).decode()
        except BaseException as error:
            if is_interrupt(error):
                raise
            problem = f"codec {codec.name!r} failed: {type(error).__name__}"
            raise PayloadError(column, problem) from error
        return f'{_PREFIX}{payload.encode(codec.name, "name")},"data":"{stored}"}}'

    # --- reading

    def value(self, stored: Mapping[str, Any]) -> Any:
        """Return the value of a stored codec object.

        Raises:
            Unreadable: the object is damaged, or its codec is unknown.
        """
        name = stored[CODEC_KEY]
        codec = self._by_name.get(name) if isinstance(name, str) else None
        if codec is None:
            raise Unreadable(
                f"it was stored with codec {name!r:.50}; give that codec to the repository, too"
            )
        try:
            return payload.loads(codec.decode(base64.b64decode(stored["data"])).decode())
        except BaseException as error:
            if is_interrupt(error):
                raise
            raise Unreadable(
                f"codec {name!r:.50} cannot read it: {type(error).__name__}"
            ) from error

    def same(self, column: str, stored: Any, plain: Any) -> bool:
        """Return True if a stored column has this plain value.

        The values are compared decoded, because a codec may write the same value differently each time.
        """
        if stored == plain or plain is None or not self._by_name:
            return bool(stored == plain)
        try:
            if column == ATTEMPTS and _has_old_params(plain):
                return _with_old_params(stored, self._plain) == _with_old_params(plain, str)
            return column in CODED and bool(
                self.value(payload.loads(stored)) == payload.loads(plain)
            )
        except (ValueError, TypeError, KeyError):
            return False

    def _plain(self, text: str) -> str:
        """Return stored params as JSON text, whether or not a codec wrote them."""
        value = payload.loads(text)
        return payload.encode_params(self.value(value)) if CODEC_KEY in value else text


#: The column of earlier attempts, which may contain params: those before a requeue that changed them.
ATTEMPTS = "earlier_attempts"


def _has_old_params(attempts: str) -> bool:
    # Within a JSON text, the quotation marks of a text are escaped.
    return '"params":' in attempts


def _with_old_params(attempts: str, convert: Callable[[str], str]) -> str:
    """Return the text of attempts with the JSON text of all old params converted."""
    found = payload.loads(attempts)
    for attempt in found:
        for changed in attempt[7:8]:
            if isinstance(changed, dict) and "params" in changed:
                changed["params"] = convert(changed["params"])
    return payload.encode(found, ATTEMPTS, max_size=payload.NO_LIMIT)


#: The codecs of a repository that was given none.
NO_CODECS = Codecs()
