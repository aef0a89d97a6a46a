"""Findings in words."""

from __future__ import annotations

from finitune.core.codes import all_codes, fill
from finitune.core.errors import describe
from finitune.core.messages.catalogue import language
from finitune.core.types import Finding


def finding_line(finding: Finding) -> str:
    """Code, what, where: one line in the current language."""
    code = all_codes().get(finding.code)
    what = fill(code.text(language()).what, finding.data) if code else str(dict(finding.data))
    return f"{finding.code} {what}" + (f" [{finding.where}]" if finding.where else "")


def finding_text(finding: Finding) -> str:
    """The whole message: what, where, why, what to try."""
    code = all_codes().get(finding.code)
    return describe(code, finding.where, finding.data) if code else finding_line(finding)
