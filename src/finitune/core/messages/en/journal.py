"""Words of the journal: what is wrong with a line."""

TEXTS = {
    "journal.cut": "its end is missing: {name} was written after a line that is no longer there",
    "journal.damage": "line {line}: {reason}",
    "journal.not_json": "not JSON",
    "journal.no_record": "not a record",
    "journal.bits": "bits changed",
    "journal.gap": "a line is missing before this one",
    "journal.repeated": "repeated",
    "journal.misplaced": "does not belong here",
    "journal.unchecked": "no checksum, after lines that have one",
}
