"""What a rank says that only noticed the absence of another, in the words of gloo, NCCL and torch's store."""

from __future__ import annotations

import re

_TIMEOUT = re.compile(
    r"timed out waiting \d+ ?ms|wait timeout after \d+ ?ms|timed out after \d+ ?(ms|milliseconds|seconds waiting for)\b"
    r"|watchdog caught collective operation timeout|before timing out|pass monitoredbarrier in|socket timeout",
    re.IGNORECASE,
)
_LOSS = re.compile(
    r"^(torch\.distributed\.)?Dist\w*Error\b"
    r"|connection (was )?(likely )?(reset|refused|closed|aborted)|closed by (peer|remote)|broken pipe|socket closed"
    r"|pair closure|(read|write)v? error|remote process exited|failed to (recv|send)|(recv|send)(value|bytes)? failed"
    r"|\b(gloo|nccl|ncclremoteerror|tcpstore|process ?group\w*|store->\w+)\b|communicator was aborted"
    r"|store .*(closed|not available)",
    re.IGNORECASE,
)
_WAITED = re.compile(r"\b(?:waiting|after|in) (?P<number>\d+) ?(?P<unit>ms|milliseconds|s|seconds)\b", re.IGNORECASE)
_WAITED_BY_NCCL = re.compile(r"timeout\(ms\)=(\d+)", re.IGNORECASE)


def is_timeout(text: str) -> bool:
    """Whether an exception's text tells of a rank that was waited for in vain."""
    return _TIMEOUT.search(text) is not None


def is_echo(text: str) -> bool:
    """Whether an exception's text, with or without its type before it, may tell of another rank's end or absence.

    A rank's own mistake can have the same words (a call of the group before there is one); so this makes a
    suspect of what it is true of, who is not blamed where anybody else can be.
    """
    return is_timeout(text) or _LOSS.search(text) is not None


def seconds_waited(text: str) -> float | None:
    """How long a rank was waited for, as far as the text says."""
    if not is_timeout(text):
        return None
    if found := _WAITED_BY_NCCL.search(text):
        return int(found[1]) / 1000
    found = _WAITED.search(text)
    if found is None:
        return None
    return int(found["number"]) / (1000 if found["unit"].lower().startswith("m") else 1)


def how_long(text: str) -> str:
    """The same for people, with a space before it; empty where the text does not say."""
    seconds = seconds_waited(text)
    return f" for more than {seconds:g} s" if seconds is not None else ""
