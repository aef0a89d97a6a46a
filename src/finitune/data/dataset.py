"""From sources to a data set of token rows, in one pass.

::

    rows = read_rows(file)                     sources.py    a bad line is a Finding
    format = sniff(first rows) or the named    formats/*.py
    example = format.to_messages(row)          formats/*.py  a bad row is a Finding
    encoded = encoder.encode(examples)         encode.py     template, tokens, mask, length
    survey.add(...)                            survey.py     what is odd about the whole

Bad rows are counted by code and left out (``on_bad_row: skip``), or refuse the data set (``stop``). What is
wrong with files or settings is one UserError each, all raised together.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finitune.core.codes import all_codes, fill
from finitune.core.errors import UserError, UserErrors, raise_all
from finitune.core.messages.catalogue import language
from finitune.core.registry import load, names
from finitune.core.types import Finding, Severity
from finitune.data.codes import ALL_ROWS_BAD, BAD_SETTING, SPLIT_TOO_LARGE, STOPPED, UNKNOWN_COLUMNS
from finitune.data.config import DataConfig, unknown_format
from finitune.data.encode import Encoder
from finitune.data.files import STDLIB, Source, check_file, expand, shorten
from finitune.data.records import Encoded, Example, Row, with_system
from finitune.data.sources import read_rows
from finitune.data.survey import Survey

__all__ = ["DataConfig", "Dataset", "Source", "load_dataset", "split"]

_BATCH_ROWS = 512
_SNIFFED_ROWS = 20
_SHOWN_BAD_ROWS = 10


@dataclass(frozen=True)
class Dataset:
    """Token rows in file order, and everything that was found on the way."""

    rows: Sequence[Encoded]
    findings: Sequence[Finding] = ()
    num_read: int = 0
    """Raw rows read, bad ones included."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Format of each source."""

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Number of findings by code, sorted by code."""
        return dict(sorted(Counter(f.code for f in self.findings).items()))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (num rows,): tokens of each row."""
        return np.array([len(r) for r in self.rows], dtype=np.int64)

    @cached_property
    def num_supervised(self) -> np.ndarray:
        """int64 (num rows,): targets of each row."""
        return np.array([int(r.supervised.sum()) for r in self.rows], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all token rows: raw content, ids and targets. Where the files lie plays no part."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(f"{row.id.digest}:{row.chunk}:{len(row)};".encode())
            digest.update(np.ascontiguousarray(row.ids, dtype="<i4").tobytes())
            digest.update(np.packbits(row.supervised).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)


def load_dataset(
    sources: str | Path | Source | Sequence[str | Path | Source] | Mapping[str, str],
    tokenizer: Any,
    config: DataConfig,
) -> Dataset:
    """Read, tokenise and check all sources.

    Args:
        sources: files, patterns, ``finitune:stdlib``; a mapping gives each its format.
        tokenizer: a fast Hugging Face tokenizer.
        config: see :class:`DataConfig`.

    Raises:
        UserError, UserErrors: settings or files that cannot be; no usable row; bad rows where
            ``on_bad_row`` is "stop".
    """
    files = expand(sources)
    raise_all(_faults(files, config))
    loading = _Loading(Encoder(tokenizer, config), config)
    errors: list[UserError] = []
    for source in files:
        try:
            loading.read(source)
        except UserError as error:
            if not any(e.code is error.code and e.where == error.where for e in errors):
                errors.append(error)
    raise_all(errors)
    return loading.finish()


def _faults(files: Sequence[Source], config: DataConfig) -> list[UserError]:
    found: list[UserError | None] = [*config.faults()]
    if not files:
        found.append(UserError(BAD_SETTING, "data.train", name="data.train", value=[], expected="at least one file"))
    for source in files:
        found.append(unknown_format(source.format))
        if source.path != STDLIB:
            found.append(check_file(source.path))
        if source.unit not in ("line", "file"):
            found.append(UserError(BAD_SETTING, source.path, name="unit", value=source.unit, expected="line | file"))
    return [f for f in found if f is not None]


class _Loading:
    """A data set while it is being read."""

    def __init__(self, encoder: Encoder, config: DataConfig) -> None:
        self._encoder, self._config = encoder, config
        self._survey = Survey()
        self._rows: list[Encoded] = []
        self._findings: list[Finding] = []
        self._formats: dict[str, str] = {}
        self._num_read = 0

    def read(self, source: Source) -> None:
        """Take in one source."""
        rows = islice(read_rows(source.path, source.unit), self._config.limit_rows)
        head = list(islice(rows, _SNIFFED_ROWS))
        name = _format_name(source, head, self._config)
        to_messages = load("formats", name).to_messages
        self._formats[source.path] = name
        for batch in _batches(head, rows):
            self._num_read += len(batch)
            results = [to_messages(r) if isinstance(r, Row) else r for r in batch]
            self._findings += [r for r in results if isinstance(r, Finding)]
            prompt = self._config.system_prompt
            self._encode([with_system(r, prompt) for r in results if isinstance(r, Example)], name)

    def _encode(self, examples: list[Example], format_name: str) -> None:
        if any(e.text is None for e in examples):
            self._encoder.prepare_conversations(format_name)
        for example, outcome in zip(examples, self._encoder.encode(examples), strict=True):
            self._findings += outcome.findings
            if outcome.rows:
                self._rows += outcome.rows
                self._survey.add(example, outcome, self._encoder)

    def finish(self) -> Dataset:
        """The data set, unless its bad rows forbid it."""
        bad = [f for f in self._findings if f.severity is Severity.ERROR]
        counts = ", ".join(f"{code} x {n}" for code, n in sorted(Counter(f.code for f in bad).items()))
        numbers = {"num_rows": self._num_read, "counts": counts}
        if not self._rows:
            first = _in_words(bad[0]) if bad else "-"
            raise UserError(ALL_ROWS_BAD, ", ".join(self._formats), first=first, **numbers)
        if bad and self._config.on_bad_row == "stop":
            shown = [UserError(all_codes()[f.code], f.where, **f.data) for f in bad[:_SHOWN_BAD_ROWS]]
            head = UserError(STOPPED, "data.on_bad_row", num_bad=len(bad), num_shown=len(shown), **numbers)
            raise UserErrors([head, *shown])
        findings = [*self._findings, *self._survey.findings(self._encoder)]
        return Dataset(self._rows, findings, self._num_read, self._formats)


def _batches(head: list[Row | Finding], rest: Iterator[Row | Finding]) -> Iterator[list[Row | Finding]]:
    batch = head
    while batch:
        yield batch
        batch = list(islice(rest, _BATCH_ROWS))


def _in_words(finding: Finding) -> str:
    page = all_codes()[finding.code].text(language())
    return f"{finding.code} {finding.where}: {fill(page.what, finding.data)}"


def _format_name(source: Source, head: Sequence[Row | Finding], config: DataConfig) -> str:
    """The named format, else the one that fits the first rows best.

    Raises:
        UserError: no format fits, with the columns found and what each format needs.
    """
    named = source.format if source.format != "auto" else config.format
    if named != "auto":
        return named
    fields = [r.fields for r in head if isinstance(r, Row)]
    scores = {name: sum(load("formats", name).sniff(f) for f in fields) for name in names("formats")}
    best = max(scores, key=lambda name: scores[name])
    if scores[best] > 0 or not fields:
        return best if scores[best] > 0 else "text"  # no readable row at all: each is a finding already
    columns = shorten(sorted({str(k) for f in fields for k in f}), 20)
    needs = "; ".join(f"{n}: {getattr(load('formats', n), 'COLUMNS', '?')}" for n in names("formats"))
    raise UserError(UNKNOWN_COLUMNS, source.path, path=source.path, columns=columns, needs=needs)


def split(
    dataset: Dataset, *, eval_rows: int | None = None, eval_fraction: float | None = None, seed: int = 0
) -> tuple[Dataset, Dataset]:
    """(training part, evaluation part), each in file order.

    Pieces of one document and rows of the same content stay on one side, so the evaluation part may come
    out slightly larger than asked. All findings stay with the training part.

    Args:
        dataset: what to divide.
        eval_rows: wanted number of token rows; or
        eval_fraction: wanted share of them, 0..1.
        seed: of the choice.

    Raises:
        UserError: one side would be empty.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(dataset.rows):
        groups.setdefault(row.id.digest, []).append(index)
    wanted = eval_rows if eval_rows is not None else round(len(dataset) * (eval_fraction or 0.0))
    members = list(groups.values())
    chosen: set[int] = set()
    for group in np.random.Generator(np.random.PCG64([seed & (2**64 - 1), 0x5911])).permutation(len(members)):
        if len(chosen) >= wanted:
            break
        chosen.update(members[group])
    if not 0 < len(chosen) < len(dataset):
        raise UserError(SPLIT_TOO_LARGE, "data.eval", wanted=wanted, num_rows=len(dataset))
    train = [r for i, r in enumerate(dataset.rows) if i not in chosen]
    held_out = [r for i, r in enumerate(dataset.rows) if i in chosen]
    rest = (dataset.num_read, dataset.formats)
    return Dataset(train, dataset.findings, *rest), Dataset(held_out, (), *rest)
