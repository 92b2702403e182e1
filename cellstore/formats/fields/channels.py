"""How the channels that a microscope numbered or named are called here."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import UnknownNameError, UserInputError

_REMEMBERED = 1000


class ChannelNames:
    """Gives channels the names that a user wants, and keeps two of one image apart.

    ``wanted`` is number or name as found -> name wanted; a number does not fix a stain, so what
    is not in it keeps the name it came with.

    Raises:
        UserInputError: two channels are wanted with one name, or a name is empty.
    """

    def __init__(self, wanted: Mapping[str, str] | None = None) -> None:
        self._wanted = {key.strip().lower(): name.strip() for key, name in (wanted or {}).items()}
        self._names = {name.lower() for name in self._wanted.values()}
        if "" in self._names or len(self._names) < len(self._wanted):
            raise UserInputError(
                "--channels must give each channel a name of its own, like 1=Mito,5=DNA."
            )
        self._used: set[str] = set()
        self._seen: set[str] = set()
        self._owners: dict[str, int] = {}

    def name(self, number: int | None, found: str) -> str:
        """Return the name of the channel numbered ``number`` that came as ``found``.

        Of two numbers with one name, as some microscopes have two 'Brightfield', the later one
        gets its number added.

        Raises:
            UserInputError: a channel was wanted with the name that another one came with.
        """
        name = self._renamed(number, found)
        owner = number if number is None else self._owners.setdefault(name.lower(), number)
        if owner == number:
            return name
        if name.lower() in self._names:
            raise UserInputError(
                f"Channels {owner} and {number} would both be {name!r}. "
                "Give each a name of its own with --channels."
            )
        return f"{name} (ch{number})"

    def check_used(self) -> None:
        """Check that each name wanted was for a channel that came.

        Raises:
            UnknownNameError: one was not; the message has channels that did come.
        """
        for key in self._wanted:
            if key not in self._used:
                raise UnknownNameError.of("channel", key, sorted(self._seen))

    def _renamed(self, number: int | None, found: str) -> str:
        if len(self._seen) < _REMEMBERED:
            self._seen.add(found)
        for key in ("" if number is None else str(number), found.strip().lower()):
            if key in self._wanted:
                self._used.add(key)
                return self._wanted[key]
        return found
