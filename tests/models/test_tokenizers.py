"""InternLM2's SentencePiece tokenizer: the ids of SentencePiece itself, or a clear refusal."""

import builtins
import json
import shutil
from pathlib import Path

import pytest

from finitune.core.errors import UserError
from finitune.models.tiny import CHATML, tiny_tokenizer
from finitune.models.tokenizers import INTERNLM2_CHATML, has_tokenizer, load_tokenizer, write_tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
INTERNLM = DATA / "InternLM__InternLM" / "V7_sft.model"
UNIGRAM = DATA / "meta-pytorch__torchtune" / "m.model"
TEXTS = [
    "Hello world",
    " leading and trailing  ",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002",
    "if x:\n\treturn 1.5e-3",
    "\U0001f680 caf\u00e9 \u0416",
    "",
]


def folder_with(model: Path, folder: Path) -> Path:
    pytest.importorskip("sentencepiece", reason="the optional package sentencepiece is not installed")
    pytest.importorskip("google.protobuf", reason="the optional package protobuf is not installed")
    if not model.is_file():
        pytest.skip(f"no {model.name} beside the project")
    shutil.copy(model, folder / "tokenizer.model")
    return folder


def test_the_ids_are_those_of_sentencepiece(tmp_path):
    import sentencepiece

    folder = folder_with(INTERNLM, tmp_path)
    tokenizer, notes = load_tokenizer(folder, "internlm2")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(INTERNLM))
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer("Hello").input_ids[0] == tokenizer.bos_token_id == 1
    assert notes == []  # InternLM 1 has no <|im_start|>, so no ChatML is given


def test_they_stay_so_through_a_saved_folder(tmp_path):
    from transformers import AutoTokenizer

    tokenizer, _ = load_tokenizer(folder_with(INTERNLM, tmp_path), "internlm2")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer, out)
    again = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def test_a_tokenizer_that_cannot_be_converted_exactly_is_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder_with(UNIGRAM, tmp_path), "internlm2")
    assert caught.value.code.code == "MOD021"


def test_chat_markers_bring_internlm2s_template(tmp_path):
    folder = folder_with(INTERNLM, tmp_path)
    added = {
        str(92543 + 20000 + i): {
            "content": token,
            "special": True,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, token in enumerate(("<|im_start|>", "<|im_end|>"))
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    tokenizer, notes = load_tokenizer(folder, "internlm2")
    assert [n.code for n in notes] == ["MOD035"]
    shown = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert shown == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in tokenizer(shown, add_special_tokens=False).input_ids


def test_a_broken_sentencepiece_file(tmp_path):
    folder = folder_with(INTERNLM, tmp_path)
    (folder / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, "internlm2")
    assert caught.value.code.code == "MOD019"


def test_without_sentencepiece_the_cure_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ImportError("No module named 'sentencepiece'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, "internlm2")
    assert caught.value.code.code == "MOD020"
    assert "finitune[sentencepiece]" in str(caught.value)


def test_an_internlm2_folder_with_a_fast_tokenizer(tmp_path):
    tiny = tiny_tokenizer()
    tiny.chat_template = None
    tiny.save_pretrained(tmp_path)
    assert has_tokenizer(tmp_path)
    tokenizer, notes = load_tokenizer(tmp_path, "internlm2")
    assert tokenizer.chat_template == INTERNLM2_CHATML
    assert [n.code for n in notes] == ["MOD035"]
    native, notes = load_tokenizer(tmp_path, "llama")
    assert native.chat_template is None
    assert notes == []


def test_an_internlm2_folder_without_any(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path, "internlm2")
    assert caught.value.code.code == "MOD019"


def test_writing_twice_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_tokenizer(tiny_tokenizer(), tmp_path / "a")
    again, _ = load_tokenizer(tmp_path / "a", "llama")
    write_tokenizer(again, tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert again.chat_template == CHATML
