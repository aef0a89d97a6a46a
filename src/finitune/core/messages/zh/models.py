"""Words of the models floor."""

TEXTS = {
    "models.summary": (
        "模型族 {family}，{parameters} 个参数，{dtype}（存储：{stored}）；"
        "键：缺少 {missing}，多余 {unexpected}，共享 {tied}，非有限 0"
    ),
    "models.not_a_model_file": "这是一个文件，但不是 GGUF 文件",
    "models.no_such_path": "没有这样的文件夹或文件",
    "models.no_model_type": "其中没有 model_type",
    "models.no_object": "它不是 JSON 对象",
    "models.adapter_keys": "缺少 {missing} 个张量（{first_missing}），{unexpected} 个没有位置（{first_unexpected}）",
    "models.no_base": "adapter_config.json 没有写明基座模型",
    "models.base_gone": "其基座模型 {base} 已不存在",
    "models.empty_prompt": "提示为空",
    "models.no_messages": "没有消息",
    "models.no_template": "分词器没有对话模板",
    "models.tiny_option": "选项应写作 NAME=NUMBER",
    "models.tiny_sizes": "vocab 至少为 {vocab}，hidden 应为 2 x heads 的倍数，heads 应为 kv_heads 的倍数",
}
