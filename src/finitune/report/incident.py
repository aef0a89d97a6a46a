"""An incident for people: twelve lines for a terminal, or the whole record as Markdown. From the Incident alone.

what it was, where, why (with what speaks for and against it), the proof, what was done, what it cost, what to change,
how to replay it
"""

from __future__ import annotations

from collections.abc import Sequence

from finitune.core.incident import Incident
from finitune.core.messages.catalogue import text
from finitune.report.incident_words import (
    advice_texts,
    cause_title,
    cause_what,
    clean,
    cost_text,
    cut,
    done_text,
    evidence_text,
    main_suspect,
    outcome_of,
    proof_text,
    reason_texts,
    suspect_text,
    value_text,
    what_text,
    why_text,
)
from finitune.report.words import aligned, width

MAX_LINES = 12
MAX_COLUMNS = 100
_PLACES = ("op", "module", "parameter", "moment", "buffer", "step", "rank")
_ROWS = ("row", "tokens")
_MARKDOWN = "\\`*_[]<>#|~&"

_MATTERS = 3
"""Up to here an entry is worth more than another reason."""
_LABEL_COLUMNS = 11

Entry = tuple[str, str, int]
"""Label, text, and how gladly it gets another line (0: first)."""


def summary(incident: Incident, run: str = "RUN") -> tuple[str, ...]:
    """At most twelve lines of at most 100 columns, in the language in force.

    ``run``: the run's folder as a word of a command line, for the line that tells how to replay it.
    """
    heading = text("incidents.heading", number=incident.number, step=incident.step, what=what_text(incident))
    entries = _fewer(_entries(incident, run))
    lead = max(width(text(f"incidents.label.{label}")) for label, _, _ in entries) + 4
    wrapped = [wrap(words, MAX_COLUMNS - lead) for _, words, _ in entries]
    shares = _shares([len(w) for w in wrapped], [glad for _, _, glad in entries])
    lines = [cut(heading, MAX_COLUMNS)]
    for (label, _, _), parts, share in zip(entries, wrapped, shares, strict=True):
        kept = parts[:share]
        if len(parts) > share:
            kept[-1] = cut(f"{kept[-1]} {parts[share]}", MAX_COLUMNS - lead)
        title = text(f"incidents.label.{label}")
        first = "  " + title + " " * (lead - 2 - width(title))
        lines += [(first if i == 0 else " " * lead) + part for i, part in enumerate(kept)]
    return tuple(lines)


def _entries(incident: Incident, run: str) -> list[Entry]:
    entries: list[Entry] = [("where", where_text(incident), 3)]
    row = main_suspect(incident, *_ROWS)
    if row is not None:
        entries.append(("row", _with_others(incident, suspect_text(row), _ROWS), 6))
    entries.append(("why", why_text(incident), 1))
    top = incident.diagnosis.top
    if top is not None:
        entries += [("for", words, 5) for words in reason_texts(incident, top.reasons_for)[:2]]
        entries += [("against", words, 7) for words in reason_texts(incident, top.reasons_against)[:1]]
    entries += [("proof", proof_text(incident), 4), ("done", done_text(incident), 2), ("cost", cost_text(incident), 8)]
    advice = advice_texts(incident)
    if advice:
        entries.append(("change", advice[0], 0))
    return [*entries, ("replay", replay_text(incident, run), 9)]


def _fewer(entries: list[Entry]) -> list[Entry]:
    """Without reasons that stand in the way of what matters more: a second reason for, then the one against."""
    kept = list(entries)
    for label in ("for", "against", "for"):
        columns = MAX_COLUMNS - _LABEL_COLUMNS
        needed = sum(len(wrap(words, columns)) if glad <= _MATTERS else 1 for _, words, glad in kept)
        same = [e for e in kept if e[0] == label]
        if needed >= MAX_LINES and same:
            kept.remove(same[-1])
    return kept[: MAX_LINES - 1]


def where_text(incident: Incident) -> str:
    """The place, with its numbers."""
    found = main_suspect(incident, *_PLACES)
    if found is not None:
        return _with_others(incident, suspect_text(found), _PLACES)
    top = incident.diagnosis.top
    where = (top.where if top else "") or incident.finding.where
    if where:
        return clean(where)
    rows = text("incidents.where.batch", count=len(incident.rows))
    return f"{text('incidents.where.unknown')}; {rows}"


def _with_others(incident: Incident, said: str, kinds: Sequence[str]) -> str:
    """With the number of others of the same kind as the first."""
    found = main_suspect(incident, *kinds)
    others = sum(s.kind == found.kind for s in incident.suspects) - 1 if found else 0
    return f"{said} {text('incidents.where.more', count=others)}" if others > 0 else said


def replay_text(incident: Incident, run: str) -> str:
    """The command that runs it again."""
    if incident.capsule is None:
        return text("incidents.replay.none")
    return text("incidents.replay.how", path=f"{run}/{clean(incident.capsule)}")


def wrap(words: str, columns: int) -> list[str]:
    """Lines of at most so many columns, broken at spaces where there are any; never empty."""
    lines, line = [], ""
    for word in words.split(" "):
        piece = f"{line} {word}" if line else word
        while width(piece) > columns:
            if line and width(word) <= columns:
                lines.append(line)
                piece = word
                break
            fits = _fitting(piece, columns)
            lines.append(piece[:fits])
            piece = piece[fits:]
        line = piece
    return [*lines, line]


def _fitting(words: str, columns: int) -> int:
    """How many characters fit; at least one."""
    count, used = 0, 0
    while count < len(words) and used + width(words[count]) <= columns:
        used += width(words[count])
        count += 1
    return max(1, count)


def _shares(wanted: Sequence[int], glad: Sequence[int]) -> list[int]:
    """Lines of each entry: one each, and what is left to the gladdest first."""
    shares = [1] * len(wanted)
    left = MAX_LINES - 1 - len(wanted)
    for index in sorted(range(len(wanted)), key=lambda i: glad[i]):
        more = min(left, wanted[index] - 1)
        shares[index] += more
        left -= more
    return shares


# -- the whole record -----------------------------------------------------------------------------------------------


def to_markdown(incident: Incident, run: str = "RUN") -> str:
    """The whole incident as a Markdown page."""
    what = what_text(incident)
    heading = text("incidents.heading", number=incident.number, step=incident.step, what=what)
    facts = [(text(f"incidents.label.{label}"), words) for label, words, _ in _entries(incident, run)]
    lines = [f"# {escaped(heading)}", "", *(f"- **{escaped(label)}**: {escaped(words)}" for label, words in facts)]
    lines += [f"- {escaped(words)}" for words in advice_texts(incident)[1:]]
    lines += _section("causes", ["code", "cause", "%", "for", "against"], _causes(incident))
    evidence = [[e.experiment, e.result.value, f"{e.replays:g}", evidence_text(e)] for e in incident.evidence]
    lines += _section("evidence", ["experiment", "result", "replays", ""], evidence)
    suspects = [[s.kind, s.name, value_text(s.data)] for s in incident.suspects]
    lines += _section("suspects", ["kind", "name", ""], suspects)
    trials = [
        [str(t.plan.get("remedy", "?")), "yes" if t.holds else "no", t.reason, value_text(list(t.losses))]
        for t in incident.trials
    ]
    lines += _section("trials", ["remedy", "holds", "reason", "losses"], trials)
    lines += _section("facts", ["", ""], [[str(k), value_text(v)] for k, v in incident.facts.items()])
    return "\n".join(lines) + "\n"


def _causes(incident: Incident) -> list[list[str]]:
    return [
        [
            c.code,
            f"{cause_title(c.code)}. {cause_what(c)}",
            f"{100 * c.confidence:.0f}",
            ", ".join(c.reasons_for),
            ", ".join(c.reasons_against),
        ]
        for c in incident.diagnosis.causes
    ]


def _section(name: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    table = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return ["", f"## {text(f'incidents.md.{name}')}", "", *(f"| {' | '.join(row)} |" for row in table)]


def escaped(words: str) -> str:
    """Text from data inside Markdown: nothing in it is markup, and it stays on its line."""
    return "".join(f"\\{c}" if c in _MARKDOWN else c for c in clean(words))


# -- lists ----------------------------------------------------------------------------------------------------------


def table(incidents: Sequence[Incident]) -> list[str]:
    """One line an incident, under a heading. Loads no experiment or remedy."""
    names = ("number", "step", "failed", "cause", "where", "outcome", "remedy", "cost")
    return aligned([tuple(text(f"incidents.head.{n}") for n in names), *(_cells(i) for i in incidents)])


def _cells(incident: Incident) -> tuple[str, ...]:
    top = incident.diagnosis.top if incident.diagnosis.known else None
    return (
        str(incident.number),
        str(incident.step),
        incident.trigger.value,
        clean(top.code) if top else text("incidents.list.unknown"),
        cut(clean(top.where), 36) if top and top.where else "-",
        text(f"incidents.outcome.{outcome_of(incident)}"),
        clean(incident.remedy or "-"),
        f"{incident.replays:g}",
    )
