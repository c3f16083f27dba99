"""Small tokenizers as Hugging Face checkpoints bring them, saved by transformers; for tests of other rooms too."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXTS = [
    "The film was good.",
    "user: is it good?\n\nassistant: it is, it's the best film (of 1999).",
    "[INST] [/INST]",
    *["\n\n"] * 5,
] * 3

CHATML = r"""
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace("\n", "")
MARKED = r"""
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}
{{ '\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""".replace("\n", "")
LLAMA2 = r"""
{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""".replace("\n", "")
PHI3 = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>{{ '\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt else '<|endoftext|>' }}"
)
THINKS = "('thinks: ' if loop.last and message['role'] == 'assistant' else '') + message['content']"
LAST_DIFFERS = CHATML.replace("message['content']", THINKS)  # as Qwen3's
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML


def byte_bpe(special: list[str]) -> tokenizers.Tokenizer:
    """As GPT-2's, Qwen's and Llama 3's: bytes, merged."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def metaspace_bpe() -> tokenizers.Tokenizer:
    """As Llama 2's: sentencepiece's spaces, bytes for what is unknown, BOS before every text."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(fallback)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # no merge across words, as in sentencepiece
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False))
    backend.pre_tokenizer = None
    return with_bos(backend, "<s>")


def with_bos(backend: tokenizers.Tokenizer, bos: str) -> tokenizers.Tokenizer:
    """The same, with a post-processor that puts BOS first."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return backend


def save(directory: Path, backend: tokenizers.Tokenizer, template: str | None = None, **names: str) -> Path:
    """Writes a checkpoint's tokenizer files; names are those of transformers, such as eos_token."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)
    tokenizer.save_pretrained(directory)
    return directory


def load_theirs(directory: Path) -> Any:
    """Load a directory with transformers."""
    return AutoTokenizer.from_pretrained(directory)


def gpt2(directory: Path) -> Path:
    """One special token for everything, no padding, no template."""
    end = "<|endoftext|>"
    return save(directory, byte_bpe([end]), bos_token=end, eos_token=end, unk_token=end)


def chatml(directory: Path, template: str = CHATML) -> Path:
    """As SmolLM2 or Qwen2 (instruct): turns end with EOS and a newline, padding is EOS, no BOS."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return save(directory, byte_bpe(special), template, **names)


def llama2(directory: Path) -> Path:
    """BOS before every text and in the template, an unknown token, no padding."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return save(directory, metaspace_bpe(), LLAMA2, **names)


def gemma(directory: Path) -> Path:
    """A token of its own ends turns, which generation_config.json says, beside another."""
    special = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<|eom|>"]
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    save(directory, with_bos(byte_bpe(special), "<bos>"), "{{ bos_token }}" + CHATML, **names)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    return directory


CHECKPOINTS = {"gpt2": gpt2, "chatml": chatml, "llama2": llama2, "gemma": gemma}
