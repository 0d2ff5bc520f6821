"""Tokenizers of the kinds that models have, trained on a few texts."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.problems import generate

# The words of Llama 3: line breaks join the marks before them
LLAMA_3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts() -> list[str]:
    problems = [generate(3, "train", index) for index in range(400)]
    return [f"Question: {p.question}\nAnswer: {p.answer}" for p in problems] + ["Q: Why?\nA: so", "[INST] x [/INST]"]


def trained(model, pre_tokenizer, decoder, special: list[str], **options) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    kind = trainers.WordPieceTrainer if isinstance(model, models.WordPiece) else trainers.BpeTrainer
    tokenizer.train_from_iterator(texts(), kind(vocab_size=500, special_tokens=special, show_progress=False, **options))
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer


def llama_3() -> PreTrainedTokenizerBase:
    """A `?` and the line break after it are one token; the BOS is written by the tokenizer."""
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    words = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = trained(models.BPE(), words, decoders.ByteLevel(), ["<s>", "</s>"], initial_alphabet=alphabet)
    return PreTrainedTokenizerFast(tokenizer_object=with_bos(tokenizer, "<s>"), bos_token="<s>", eos_token="</s>")


def qwen() -> PreTrainedTokenizerBase:
    """No BOS, and a chat template."""
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = trained(models.BPE(), words, decoders.ByteLevel(), special, initial_alphabet=alphabet)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHATML,
        additional_special_tokens=["<|im_start|>"],
    )


def sentencepiece() -> PreTrainedTokenizerBase:
    """Llama 2's kind: a space before the first word, and none of the bytes."""
    words = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = trained(models.BPE(unk_token="<unk>"), words, decoders.Metaspace(), ["<unk>", "<s>", "</s>"])
    options = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=with_bos(tokenizer, "<s>"), **options)


def wordpiece() -> PreTrainedTokenizerBase:
    """BERT's: lower case, `[CLS]` before and `[SEP]` after the text, neither BOS nor EOS."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = trained(
        models.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), special
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
