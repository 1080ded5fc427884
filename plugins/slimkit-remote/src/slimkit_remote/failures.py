"""Words for what goes wrong between here and a board: the thing, the place and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slimkit_remote.connection import Place

_SSH_FAILED = 255
_NO_COMMAND = (126, 127)


def lost(code: int | None, said: str, place: Place, doing: str) -> str:
    """Why there is no connection.

    Args:
        code: what ssh ended with, or the program that it ran; None where it has not ended.
        said: what both wrote to standard error.
        place: the board.
        doing: what was done when it ended.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1].rstrip(".") if lines else "no reason was given"
    if code in _NO_COMMAND:
        return (
            f"{place} has no program {place.python!r}: install Python 3.8 or newer there, or set "
            "the option python to its path"
        )
    if code == _SSH_FAILED:
        for sign, text in _SIGNS:
            if sign in said:
                return text.format(place=place, file=_known_hosts(place), host=_address(place))
    if code == 1 and "Python 3.8 is needed" in said:
        return (
            f"{place} has a {place.python!r} that is too old: install Python 3.8 or newer, or set "
            "the option python to its path"
        )
    return (
        f"the connection to {place} was lost while {doing} ({last}): look whether the board and "
        "its network are up, and start again"
    )


def told(kind: str, says: str, place: Place, doing: str) -> str:
    """What the runner itself could not do.

    Args:
        kind: as `slimkit_remote.board` calls it.
        says: the error there in one line.
        place: the board.
        doing: what was done.
    """
    if kind == "missing":
        module = says.partition("'")[2].partition("'")[0] or "a module"
        return (
            f"{place} lacks {module} for {place.python!r} ({says}): {place.python} -m pip install "
            f"{module} there, or set the option python to an interpreter that has it"
        )
    where = place.folder or "its temporary folder"
    if kind == "full":
        return (
            f"the disk of {place} is full at {where} while {doing} ({says}): free space there, or "
            "set the option folder to a disk that has some"
        )
    if kind == "files":
        return (
            f"{place} cannot keep files in {where} while {doing} ({says}): set the option folder "
            "to a folder there that can be written to"
        )
    return f"{place} failed while {doing}: {says}"


_SIGNS = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "{place} shows another host key than the one in {file}: if the board was set up anew, "
        "remove the old key with `ssh-keygen -R {host}` and add the new one; if not, something "
        "else answers in its place",
    ),
    (
        "Host key verification failed",
        "the host key of {place} is not in {file}: compare what `ssh-keyscan` prints with the key "
        "on the board, and append it to that file",
    ),
    (
        "Permission denied",
        "{place} does not let this user in: append the public half of the key to "
        "~/.ssh/authorized_keys there (`ssh-copy-id`), and check the options user and key",
    ),
    (
        "Connection refused",
        "nothing answers ssh at {place}: start sshd there, or correct the options host and port",
    ),
    (
        "Could not resolve hostname",
        "no host is called as in {place}: correct the option host, or give the board's address",
    ),
    (
        "timed out",
        "{place} does not answer: look whether the board and its network are up, or raise the "
        "option timeout",
    ),
    (
        "No route to host",
        "{place} cannot be reached from here: look whether the board and its network are up",
    ),
)
"""What ssh writes, and what to say then; the first that fits."""


def _known_hosts(place: Place) -> str:
    return place.known_hosts or "~/.ssh/known_hosts"


def _address(place: Place) -> str:
    """A host as known_hosts has it, with the file where it is not ssh's own."""
    host = f"'[{place.host}]:{place.port}'" if place.port not in (None, 22) else place.host
    return f"{host} -f {place.known_hosts}" if place.known_hosts else host
