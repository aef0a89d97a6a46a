"""Words around every error."""

TEXTS = {
    "error.where": "where",
    "error.why": "why",
    "error.try": "try",
}
