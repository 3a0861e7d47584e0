"""The work: the same batches for every backend, and a digest of the ids really consumed.

Text comes from ``bench.run.instructions`` or from a JSONL file; the model's own tokenizer and chat
template turn it into ids where the model has one. A shape without a tokenizer (synthetic weights) gets
ids by hashing words, which keeps the text's repetition without pretending to be
a language model's vocabulary.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from bench.ask.conversations import Message, read_conversations
from bench.ask.experiment import Workload
from bench.load.older import tokenizer_kind, transformers_major
from bench.run.instructions import conversation

if TYPE_CHECKING:
    from hashlib import _Hash as Hash

IGNORED_LABEL = -100
"""torch's cross_entropy leaves these targets out."""
PATIENCE = 1000
"""Micro-batches without a target that are passed over before the text is given up."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Batch:
    """One micro-batch; all tensors int64, (micro_batch_size, sequence_length), on the CPU."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    """The id at each answer token, -100 at prompt and padding."""
    attention_mask: torch.Tensor
    """1 at real tokens, 0 at padding."""

    @property
    def tokens(self) -> int:
        """Non-padding tokens."""
        return int(self.attention_mask.sum())

    @property
    def loss_tokens(self) -> int:
        """Tokens that a loss is computed for (the first of a row has no prediction)."""
        return int((self.labels[:, 1:] != IGNORED_LABEL).sum())

    def add_to(self, digest: Hash) -> None:
        """Put shape, ids, labels and mask into a digest."""
        digest.update(str(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.labels, self.attention_mask):
            digest.update(tensor.numpy().tobytes())


class Encoder(Protocol):
    """Turns a conversation into ids and labels."""

    name: str
    padding_id: int

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Ids and labels of one conversation, of equal length."""


class ChatEncoder:
    """The model's own tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        import transformers

        kind: Any = getattr(transformers, tokenizer_kind(transformers_major(), folder))
        self._tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.name = f"{type(self._tokenizer).__name__} of the model"
        padding = self._tokenizer.pad_token_id
        self.padding_id = int(padding if padding is not None else self._tokenizer.eos_token_id)

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Labels cover what the assistant's last message adds to the rest of the conversation."""
        whole = self._ids(messages, prompt=False)
        prompt = self._ids(messages[:-1], prompt=True)
        if whole[: len(prompt)] != prompt:
            raise ValueError("the chat template does not put the answer after the prompt")
        return whole, [IGNORED_LABEL] * len(prompt) + whole[len(prompt) :]

    def _ids(self, messages: Sequence[Message], *, prompt: bool) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "".join(f"{message['content']}\n" for message in messages)
            first = [] if self._tokenizer.bos_token_id is None else [self._tokenizer.bos_token_id]
            return first + [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]
        encoded = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=prompt, tokenize=True, return_dict=True
        )
        return [int(i) for i in encoded["input_ids"]]


class HashEncoder:
    """Ids by hashing words into the vocabulary, for shapes that have no tokenizer."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.name = "hashed words (the shape has no tokenizer)"
        self.padding_id = 0

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Words and punctuation, each message followed by a token of its role."""
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            part = [self._id(word) for word in re.findall(r"\s?\w{1,6}|[^\w\s]", message["content"])]
            part.append(self._id(f"<end of {message['role']}>"))
            ids += part
            labels += part if message is messages[-1] else [IGNORED_LABEL] * len(part)
        return ids, labels

    def _id(self, word: str) -> int:
        digest = hashlib.sha256(word.encode()).digest()
        return 1 + int.from_bytes(digest[:8], "little") % (self._vocabulary - 1)


class WorkloadReader:
    """Batches in order, without end, with a running digest of what was consumed."""

    def __init__(self, workload: Workload, encoder: Encoder) -> None:
        self._workload = workload
        self._encoder = encoder
        self._conversations = _conversations(workload.data)
        self._digest = hashlib.sha256()
        self._left: tuple[list[int], list[int]] = ([], [])
        self.examples = 0
        self.tokens = 0
        self.loss_tokens = 0
        self.batches_without_targets = 0
        self.source = workload.data or "generated instructions"
        self.tokenizer = encoder.name

    @property
    def digest(self) -> str:
        """SHA-256 over ids, labels and masks of every batch so far, in order."""
        return self._digest.hexdigest()

    @property
    def share_digest(self) -> str:
        """SHA-256 over the batches of this process: all of them, unless others share the stream."""
        return self.digest

    def next_batch(self) -> Batch:
        """The next micro-batch that holds an answer token (or any, where the workload asks for that).

        The mean loss over no token is NaN and would look like a failure of the backend, so micro-batches
        without one (prompts longer than the row) are passed over, the same ones for every backend, and
        counted. Raises ValueError where the text has none but those.
        """
        for _ in range(PATIENCE):
            batch = self._draw()
            empty = batch.loss_tokens == 0
            self.batches_without_targets += empty
            if not empty or self._workload.without_targets == "train":
                self._count(batch)
                return batch
        raise ValueError(
            f"{PATIENCE} micro-batches in a row hold no answer token; raise workload.sequence_length"
        )

    def _draw(self) -> Batch:
        row = self._packed_row if self._workload.padding == "packed" else self._padded_row
        rows = [row() for _ in range(self._workload.micro_batch_size)]
        return Batch(*(torch.tensor([r[part] for r in rows], dtype=torch.int64) for part in range(3)))

    def _count(self, batch: Batch) -> None:
        batch.add_to(self._digest)
        self.tokens += batch.tokens
        self.loss_tokens += batch.loss_tokens

    def _example(self) -> tuple[list[int], list[int]]:
        self.examples += 1
        return self._encoder.encode(next(self._conversations))

    def _packed_row(self) -> tuple[list[int], list[int], list[int]]:
        length = self._workload.sequence_length
        ids, labels = self._left
        while len(ids) < length:
            more_ids, more_labels = self._example()
            ids, labels = ids + more_ids, labels + more_labels
        self._left = (ids[length:], labels[length:])
        return ids[:length], labels[:length], [1] * length

    def _padded_row(self) -> tuple[list[int], list[int], list[int]]:
        length = self._workload.sequence_length
        ids, labels = (part[:length] for part in self._example())
        missing = length - len(ids)
        row = (ids, labels, [1] * len(ids))
        padding = ([self._encoder.padding_id] * missing, [IGNORED_LABEL] * missing, [0] * missing)
        left = self._workload.padding == "left"
        ids, labels, mask = (p + r if left else r + p for r, p in zip(row, padding, strict=True))
        return ids, labels, mask


def encoder_for(folder: Path | None, vocabulary: int) -> Encoder:
    """The model's own tokenizer where its folder has one, else ids by hashing."""
    if folder is not None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ChatEncoder(folder)
    return HashEncoder(vocabulary)


def _conversations(data: str | None) -> Iterator[list[Message]]:
    if data is not None:
        conversations = read_conversations(Path(data))
        while True:
            yield from conversations
    index = 0
    while True:
        yield conversation(index)
        index += 1
