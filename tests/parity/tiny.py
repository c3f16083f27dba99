# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Models and tokenizers of transformers, small enough to train in a test."""

import tokenizers
import transformers

VOCABULARY = 12
PAD, EOS = 0, 1


def _config(**changes) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,  # so that the distributions are not uniform
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
        **changes,
    )


def language_model() -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM(_config())


def score_model() -> transformers.LlamaForSequenceClassification:
    return transformers.LlamaForSequenceClassification(_config(num_labels=1))


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
