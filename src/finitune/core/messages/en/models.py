"""Words of the models floor."""

TEXTS = {
    "models.summary": (
        "family {family}, {parameters} parameters in {dtype} (stored: {stored}); "
        "keys: {missing} missing, {unexpected} unexpected, {tied} tied, 0 non-finite"
    ),
    "models.not_a_model_file": "it is a file, but not a GGUF file",
    "models.no_such_path": "there is no such folder or file",
    "models.no_model_type": "it has no model_type",
    "models.no_object": "it is not a JSON object",
    "models.adapter_keys": "{missing} of its tensors are missing ({first_missing}), "
    "{unexpected} have no place ({first_unexpected})",
    "models.no_base": "adapter_config.json names no base model",
    "models.base_gone": "its base model {base} is not there any more",
    "models.empty_prompt": "the prompt is empty",
    "models.no_messages": "there are no messages",
    "models.no_template": "the tokenizer has no chat template",
    "models.tiny_option": "an option is written NAME=NUMBER",
    "models.tiny_sizes": "vocab must be at least {vocab}, hidden a multiple of 2 x heads, "
    "and heads a multiple of kv_heads",
}
