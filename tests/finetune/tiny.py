"""A tokenizer of some words and characters, built here: no hub is asked."""

import json

WORDS = [
    "the", "a", "film", "plot", "was", "is", "good", "bad", "great", "awful", "fine", "dull",
    "it", "this", "and", "so", "very", "question", "answer", "number", "add", "two", "three",
    "four", "five", "sum", "of", "below", "instruction", "response", "what", "how", "write",
    "describe", "user", "assistant", "system",
]  # fmt: skip


CHAT = (
    "{% for turn in messages %}<s> {{ turn.role }} : {{ turn.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
"""A chat template for this tokenizer, whose words of no meaning are read letter by letter."""


def build_tokenizer(**special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", *WORDS]
    pieces += [c for c in map(chr, range(33, 127)) if c not in pieces]
    model = models.WordLevel({word: i for i, word in enumerate(pieces)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        model_max_length=64, **special,
    )  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
BART = {"d_model": 16, "decoder_start_token_id": 3, "max_position_embeddings": 64}
for side in ("encoder", "decoder"):
    BART |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
FAMILIES = {
    "bert": ("BertModel", SIZES),
    "distilbert": ("DistilBertModel", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    "roberta": ("RobertaModel", SIZES),
    "deberta-v2": ("DebertaV2Model", SIZES),
    "xlnet": ("XLNetModel", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    "bart": ("BartForConditionalGeneration", BART),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0},
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 1}),
}
"""By family: the class that is saved, and the sizes of its configuration."""


def save_model(family, folder, chat_template=None, **options):
    """A random model of a family and its tokenizer, in a folder; `options` of its configuration."""
    import torch
    import transformers
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(cls_token="[CLS]", sep_token="[SEP]", bos_token="<s>")
    tokenizer.chat_template = chat_template
    if family in ("bart", "t5"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 3)]
        )
    name, sizes = FAMILIES[family]
    kind = getattr(transformers, name)
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    kind(kind.config_class(**tokens | sizes | options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
