"""The byte tokenizer of the pocket model, as a real Hugging Face fast tokenizer.

Ids: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, byte b is b + 3, and 259 to 319 are unused, so the vocabulary has 320 entries.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
BYTE_OFFSET = 3
VOCABULARY = 320


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies, in byte order.

    Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols: list[str] = []
    shifted = 0
    for byte in range(256):
        if byte in visible:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(0x100 + shifted))
            shifted += 1
    return symbols


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer from nothing. The files in this folder are this object, saved with `save_pretrained`.

    Text that spells a special token, such as "<bos>", is encoded as its bytes: only the tokenizer adds specials.
    Bytes that are no valid UTF-8 decode to U+FFFD.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<bos>", "<eos>"]
    unused = [f"<unused_{i}>" for i in range(BYTE_OFFSET + 256, VOCABULARY)]
    vocabulary = {token: i for i, token in enumerate([*special, *byte_symbols(), *unused])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*special, *unused]])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        truncation_side="left",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )
