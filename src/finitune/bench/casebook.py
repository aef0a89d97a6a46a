"""The casebook: Markdown pages, one a cause class, each a symptom that is acted out by a case of the bench.

    <!--
    codes: DAT401, DAT111
    class: N
    case: faults/nan_row/0/finitune
    -->
    # The loss is NaN from one batch on, and comes back every epoch
    ...
    ```console
    $ finitune bench --filter nan_row --seeds 1 --tell
    what the command tells, up to the score
    ```

The pages stand in the repository, not in an installed package; what links to them is the small table here, which a
test compares with the pages. Loads no torch until a case is run.

    python -m finitune.bench.casebook            say which transcripts are no longer true
    python -m finitune.bench.casebook --update   write them again
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import isclose
from pathlib import Path
from typing import Any

from finitune.bench.words import line
from finitune.core.messages.catalogue import set_language
from finitune.core.registry import names

FOLDER = "tests/casebook"
INDEX = "README"

PAGES: Mapping[str, tuple[str, ...]] = {
    "unlabelled_batch": ("DAT400", "DAT100", "DAT042", "DAT114"),
    "loud_token": ("NUM400", "NUM030", "NUM031", "MOD116"),
    "backward_overflow": ("NUM401", "NUM003", "NUM020", "NUM021"),
    "half_parameters": ("OPT400", "OPT110", "CFG201", "MOD103"),
    "blind_row": ("NUM402", "DAT110"),
    "bad_kernel": ("NUM403",),
    "not_reproducible": ("SYS400",),
    "nan_base_weight": ("MOD400", "MOD110", "MOD115", "MOD013", "SYS428"),
    "rate_jump": ("OPT401", "OPT406", "OPT002", "OPT003", "OPT004", "NUM012"),
    "lost_updates": ("OPT402", "OPT111", "MOD101", "OPT001"),
    "exp_under_mask": ("NUM404",),
    "mean_of_means": ("OPT403", "OPT112"),
    "no_gradient": ("MOD401", "MOD114"),
    "nan_row": ("DAT401", "DAT111", "DAT113"),
    "hot_rows": ("MOD402", "MOD113", "DAT045"),
    "recipe_no_stop": ("DAT402", "DAT070", "DAT112"),
    "nan_gate": ("MOD403",),
    "wrong_map": ("OPT404",),
    "wrong_device_autocast": ("SYS402", "SYS440", "SYS441", "MOD102"),
    "nan_weight_later": ("SYS403", "NUM101"),
    "recipe_edited_checkpoint": ("OPT405", "OPT113", "SYS005", "SYS006", "SYS020", "SYS021"),
    "zero_row_norm": ("NUM405", "MOD028"),
    "hidden_nan": ("NUM130",),
}
"""Page -> the codes that it is about; a code is on one page. It has the name of the fault it plants, seed 0."""

SYMPTOMS = ("NUM001", "NUM002", "NUM010", "NUM011")
"""Codes of what is seen whatever the cause: they link to the index."""

CLASSES = "ABCDEFGHIJKLMNOPQRSTUVW"
"""Cause classes of failures in the field."""

NO_PAGE: Mapping[str, str] = {}
"""Cause class -> why it has no page."""

SECTIONS = (
    "What you see",
    "What it was",
    "Try it",
    "How it was found",
    "What cures it",
    "What does not",
    "In your own script",
)

_FRONT = re.compile(r"\A<!--\n(.*?)\n-->\n", re.DOTALL)
_CONSOLE = re.compile(r"^```console\n\$ ([^\n]+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SECONDS = re.compile(r"(?<![\w.])\d+(?:\.\d+)? s\b")
_NUMBER = re.compile(r"(?<![\w.#])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.]*\w)")
_EXACT_DIGITS = 3
_BEYOND = 1e-2
"""Relative difference of two numbers whose first three digits are the same."""


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the casebook, read."""

    name: str
    codes: tuple[str, ...]
    fault_class: str
    case: str
    """Key of a case of the bench."""
    title: str
    sections: tuple[str, ...]
    command: str
    transcript: tuple[str, ...]


def page_of(code: str) -> str | None:
    """The page that a code links to, or the index; None where there is neither."""
    return INDEX if code in SYMPTOMS else next((name for name, codes in PAGES.items() if code in codes), None)


def path_of(name: str) -> str:
    """Where a page stands in the repository."""
    return f"{FOLDER}/{name}.md"


def command_of(name: str) -> str | None:
    """The command that acts a page out; None for the index."""
    if name not in PAGES:
        return None
    is_part_of_another = any(name in other and name != other for other in names("faults"))
    pattern = f"faults/{name}/" if is_part_of_another else name
    return f"finitune bench --filter {pattern} --seeds 1 --tell"


def read(name: str, content: str) -> Page:
    """A page from its text. Raises ValueError that says what is missing."""
    front, console = _FRONT.match(content), _CONSOLE.search(content)
    if front is None or console is None:
        missing = "a front matter in an HTML comment" if front is None else "a console block with a command"
        raise ValueError(f"{name}: {missing} is missing")
    facts = dict(line.split(": ", 1) for line in front[1].splitlines())
    if set(facts) != {"codes", "class", "case"}:
        raise ValueError(f"{name}: the front matter has {', '.join(facts)}; it needs codes, class, case")
    title = re.search(r"^# (.+)$", content, re.MULTILINE)
    return Page(
        name,
        tuple(facts["codes"].split(", ")),
        facts["class"],
        facts["case"],
        title[1] if title else "",
        tuple(re.findall(r"^## (.+)$", content, re.MULTILINE)),
        console[1],
        tuple(console[2].splitlines()),
    )


def transcript(record: Mapping[str, Any]) -> list[str]:
    """What ``finitune bench --tell`` says of one case, before the score."""
    lines = [f"[1/1] {record['key']}: {line(record)}", f"{record['key']}: {record['says']}"]
    for incident in record["incidents"]:
        lines += ["", *incident["summary"]]
    return lines


def acted(page: Page) -> list[str]:
    """The transcript of today: the case is run. Raises RuntimeError where the bench itself fails."""
    from finitune.bench.cases import Case
    from finitune.bench.pool import guarded_case

    kind, name, seed, contender = page.case.split("/")
    record = guarded_case(Case(kind, name, int(seed), contender))
    if "defect" in record:
        raise RuntimeError(record["defect"])
    return transcript(record)


def differences(expected: Sequence[str], actual: Sequence[str]) -> list[str]:
    """Lines that are not the same; seconds count for nothing, and numbers only up to their third digit."""
    pairs = zip_longest(expected, actual, fillvalue="(no such line)")
    return [f"- {old}\n+ {new}" for old, new in pairs if not _same(old, new)]


def _same(old: str, new: str) -> bool:
    old, new = _SECONDS.sub("* s", old).rstrip(), _SECONDS.sub("* s", new).rstrip()
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    return all(map(_close, _NUMBER.findall(old), _NUMBER.findall(new)))


def _close(old: str, new: str) -> bool:
    digits = len(re.sub(r"e.*|\D", "", old).lstrip("0"))
    return old == new or (digits > _EXACT_DIGITS and isclose(float(old), float(new), rel_tol=_BEYOND))


def updated(content: str, command: str, lines: Sequence[str]) -> str:
    """The page's text with another command and transcript."""
    made = "".join(f"{line}\n" for line in (f"```console\n$ {command}", *lines)) + "```"
    return _CONSOLE.sub(lambda _: made, content, count=1)


def pages(folder: Path) -> Iterator[tuple[Path, Page]]:
    """All pages of a folder. Raises ValueError and OSError."""
    for path in sorted(folder.glob("*.md")):
        if path.stem != INDEX:
            yield path, read(path.stem, path.read_text(encoding="utf-8"))


def main(words: Sequence[str]) -> int:
    """Compare, or rewrite with ``--update``; further words name pages. 1 where something differs or fails."""
    set_language("en")
    update, only = "--update" in words, {word for word in words if not word.startswith("-")}
    good = True
    for path, page in pages(Path(FOLDER)):
        if not only or page.name in only:
            good &= _compared(path, page, update=update)
    return 0 if good else 1


def _compared(path: Path, page: Page, *, update: bool) -> bool:
    """Tell what differs, and write it if asked to. Whether the page is true afterwards."""
    from finitune.core.files import write_atomic

    try:
        command, lines = command_of(page.name) or page.command, acted(page)
    except RuntimeError as error:
        print(f"{path}: the bench failed: {error}", flush=True)
        return False
    found = differences((page.command, *page.transcript), (command, *lines))
    print("\n".join([f"{path}: {len(found)} lines differ", *([] if update else found)]), flush=True)
    if found and update:
        write_atomic(path, updated(path.read_text(encoding="utf-8"), command, lines).encode())
    return update or not found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
