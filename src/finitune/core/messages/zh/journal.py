"""Words of the journal: what is wrong with a line."""

TEXTS = {
    "journal.cut": "末尾缺失：{name} 写于某一行之后，而该行已不在",
    "journal.damage": "第 {line} 行：{reason}",
    "journal.not_json": "不是 JSON",
    "journal.no_record": "不是一条记录",
    "journal.bits": "内容有位被改动",
    "journal.gap": "这一行之前缺少一行",
    "journal.repeated": "重复",
    "journal.misplaced": "不应出现在此处",
    "journal.unchecked": "没有校验和，而前面的行有",
}
