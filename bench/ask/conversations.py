"""Training text from a file: JSONL, one conversation a line. Torch-free, so it is checked before any run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from bench.ask.documents import parsed
from bench.errors import BrokenFile

Message = dict[str, str]
"""``role`` and ``content``."""


def read_conversations(path: Path) -> list[list[Message]]:
    """Conversations of a JSONL file: ``{"prompt", "response"}`` or ``{"messages": [...]}`` a line.

    Raises BrokenFile naming the line and what is wrong with it.
    """
    try:
        # Not splitlines(): it also cuts at separators that may stand inside a JSON text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:  # a NUL in the name is a ValueError
        raise BrokenFile(f"training text '{path}' is not readable: {error}") from None
    found = [_conversation(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise BrokenFile(f"'{path}' holds no conversations")
    return found


def _conversation(path: Path, number: int, line: str) -> list[Message]:
    def broken(why: str) -> BrokenFile:
        return BrokenFile(
            f"'{path}' line {number}: {why}",
            'a line is {"prompt": ..., "response": ...} or {"messages": [...]}',
        )

    try:
        body = parsed(line)
    except ValueError as error:
        raise broken(f"not JSON ({error})") from None
    if not isinstance(body, dict):
        raise broken("not an object")
    if {"prompt", "response"} <= body.keys():
        body = {
            "messages": [
                {"role": "user", "content": body["prompt"]},
                {"role": "assistant", "content": body["response"]},
            ]
        }
    messages = body.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise broken("neither prompt and response nor at least two messages")
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise broken("a message needs 'role' and 'content' as text")
    if messages[-1]["role"] != "assistant":
        raise broken("the last message is not the assistant's")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
