"""Words around every error."""

TEXTS = {
    "error.where": "位置",
    "error.why": "原因",
    "error.try": "可尝试",
}
