"""Codecs: how the JSON of a task is turned into what is stored, to compress or to encrypt it.

What a codec made is stored as a JSON object again, ``{"taskx:codec": name, "data": base64}``, so that a
record stays what it is for all others who read it.
"""

from __future__ import annotations

import base64
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from taskx.core import payload
from taskx.core.checks import check_int
from taskx.core.errors import ConfigurationError, PayloadError, is_interrupt
from taskx.core.model import check_name
from taskx.core.payload import CODEC_KEY
from taskx.core.writes import Insert, Update, Write

#: The columns that are stored so.
CODED = ("params", "result", "checkpoints")

_PREFIX = f'{{"{CODEC_KEY}":'


class Codec(ABC):
    """Turns the params, results and checkpoints of tasks into what is stored, and back.

    Calls come from several threads. What either method raises concerns the one task alone,
    also where it is no ``Exception``, such as the panic of an extension in Rust.

    Attributes:
        name: by which a record says what it was written with; it must never mean another one.
    """

    name: str

    @abstractmethod
    def encode(self, data: bytes) -> bytes | None:
        """What is stored for JSON text, or None to store that as it is."""

    @abstractmethod
    def decode(self, data: bytes) -> bytes:
        """The JSON text of what :meth:`encode` made."""


class ZlibCodec(Codec):
    """Compresses what is large enough to gain by it.

    Args:
        min_size: store what is smaller as it is; in bytes.
        level: 1 for speed to 9 for size.

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
        # It is stored as base64; and as it is where that would save nothing.
        return packed if len(packed) * 4 // 3 < len(data) else None

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data)


class Unreadable(ValueError):
    """What a codec made cannot be read."""


class Codecs:
    """The codecs of a repository: the first one writes, all of them read."""

    def __init__(self, given: Codec | Iterable[Codec] | None = None) -> None:
        several = isinstance(given, Iterable) and not isinstance(given, str)
        codecs: list[Any] = [] if given is None else list(given) if several else [given]  # type: ignore[arg-type]
        for codec in codecs:
            if not isinstance(codec, Codec):
                raise ConfigurationError(f"a codec must be an instance of Codec, not {codec!r}")
            if not check_name(getattr(codec, "name", None), "the name of a codec"):
                raise ConfigurationError(f"{codec!r} must have a name")
        self._by_name = {codec.name: codec for codec in codecs}
        if len(self._by_name) < len(codecs):
            raise ConfigurationError("two codecs have the same name")
        self._writer = codecs[0] if codecs else None

    # --- writing

    def coded(self, writes: Sequence[Write]) -> Sequence[Write]:
        """The writes as they are to be stored; ``PayloadError`` if the codec failed."""
        return writes if self._writer is None else [self._coded_write(write) for write in writes]

    def _coded_write(self, write: Write) -> Write:
        if isinstance(write, Insert):
            return write._replace(row=dict(self.columns(write.row)))
        if isinstance(write, Update):
            return write._replace(changes=self.columns(write.changes))
        return write

    def columns(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Columns of a row as they are to be stored; ``PayloadError`` if the codec failed."""
        if self._writer is None:
            return columns
        changed = {
            name: self._encode(name, columns[name])
            for name in CODED
            if columns.get(name) not in (None, "{}")
        }
        return {**columns, **changed} if changed else columns

    def _encode(self, column: str, text: str) -> str:
        codec = self._writer
        assert codec is not None  # asked for before
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
        """The value of an object that a codec made; ``Unreadable`` if damaged, or of an unknown codec."""
        name = stored[CODEC_KEY]
        codec = self._by_name.get(name) if isinstance(name, str) else None
        if codec is None:
            raise Unreadable(f"it was stored with codec {name!r:.50}, which is not given here")
        try:
            return payload.loads(codec.decode(base64.b64decode(stored["data"])).decode())
        except BaseException as error:
            if is_interrupt(error):
                raise
            raise Unreadable(
                f"codec {name!r:.50} cannot read it: {type(error).__name__}"
            ) from error

    def same(self, column: str, stored: Any, plain: Any) -> bool:
        """Whether a stored column holds that plain value: a codec may write it differently each time."""
        if stored == plain or column not in CODED or plain is None or not self._by_name:
            return bool(stored == plain)
        try:
            return bool(self.value(payload.loads(stored)) == payload.loads(plain))
        except (ValueError, TypeError, KeyError):
            return False


#: Those of a repository that was given none.
NO_CODECS = Codecs()
