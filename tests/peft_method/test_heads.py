"""Task heads: trained in full, saved with the adapter, left unadapted, whatever they are called."""

import copy

import peft
import pytest
import torch
import transformers as hf
from torch import nn

import hal_peft
from hal_peft.layer import HyperAdaLoraLinear

from . import zoo

BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 32, "num_labels": 3, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 64, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48,
    "max_position_embeddings": 32, "dropout": 0.0, "seq_classif_dropout": 0.0, "qa_dropout": 0.0,
}  # fmt: skip
XLNET = {"vocab_size": 64, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48, "num_labels": 3}
IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])
SEQUENCES = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
TOKENS = {"input_ids": IDS, "labels": IDS % 3}
ANSWERS = {
    "input_ids": IDS, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])
}  # fmt: skip
IMAGES = {"pixel_values": torch.ones(2, 3, 8, 8), "labels": torch.tensor([0, 2])}
SOUNDS = {"input_features": torch.ones(2, 8, 16), "labels": torch.tensor([0, 1])}

MODELS = [
    (hf.DistilBertForSequenceClassification,
     lambda: hf.DistilBertConfig(**DISTILBERT, num_labels=3), SEQUENCES, "SEQ_CLS",
     ["pre_classifier", "classifier"]),
    (hf.DistilBertForQuestionAnswering, lambda: hf.DistilBertConfig(**DISTILBERT), ANSWERS,
     "QUESTION_ANS", ["qa_outputs"]),
    (hf.DebertaV2ForSequenceClassification, zoo._deberta, SEQUENCES, "SEQ_CLS",
     ["pooler", "classifier"]),
    (hf.BartForSequenceClassification, lambda: hf.BartConfig(**BART), SEQUENCES, "SEQ_CLS",
     ["classification_head"]),
    (hf.XLNetForSequenceClassification, lambda: hf.XLNetConfig(**XLNET, dropout=0.0), SEQUENCES,
     "SEQ_CLS", ["sequence_summary", "logits_proj"]),
    (hf.RobertaForTokenClassification, lambda: hf.RobertaConfig(**zoo.SMALL), TOKENS, "TOKEN_CLS",
     ["classifier"]),
    (hf.T5ForQuestionAnswering, zoo._t5, ANSWERS, "QUESTION_ANS", ["qa_outputs"]),
    (hf.ViTForImageClassification, zoo._vit, IMAGES, None, ["classifier"]),
    (hf.WhisperForAudioClassification, zoo._whisper, SOUNDS, None, ["projector", "classifier"]),
]  # fmt: skip


def base(kind, config, heads, seed):
    """The same body for every seed, under new heads of that seed's."""
    model = zoo.made(kind, config)().eval()
    generator = torch.Generator().manual_seed(seed)
    for name in heads:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("kind", "config", "batch", "task", "heads"), MODELS, ids=[m[0].__name__ for m in MODELS]
)
def test_a_new_head_is_trained_and_saved(kind, config, batch, task, heads, tmp_path):
    model = base(kind, config, heads, seed=1)
    before = copy.deepcopy(model)
    model = peft.get_peft_model(
        model, hal_peft.HyperAdaLoraConfig(r=2, task_type=task, hypernet="direct")
    )
    assert not any(
        isinstance(module, HyperAdaLoraLinear)
        for name in heads
        for module in model.get_base_model().get_submodule(name).modules()
    )
    trained = [
        p for name in heads for p in model.get_base_model().get_submodule(name).parameters()
        if p.requires_grad
    ]  # fmt: skip
    frozen = [p for name in heads for p in before.get_submodule(name).parameters()]
    assert len(trained) == len(frozen)
    zoo.train(model, batch)
    assert not any(torch.equal(p, q) for p, q in zip(trained, frozen, strict=True))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base(kind, config, heads, seed=2), tmp_path)
    with torch.no_grad():
        found, expected = loaded(**batch).to_tuple(), model(**batch).to_tuple()
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("kind", "config", "task"),
    [
        (hf.BertForMaskedLM, lambda: hf.BertConfig(**zoo.SMALL), None),
        (hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**zoo.DECODER | zoo.ENDS), "CAUSAL_LM"),
        (hf.BertModel, lambda: hf.BertConfig(**zoo.SMALL), "FEATURE_EXTRACTION"),
    ],
)
def test_a_pretrained_head_stays_as_it_is(kind, config, task):
    """A language model's comes with its checkpoint, and a base model has none."""
    model = peft.get_peft_model(
        zoo.made(kind, config)(), hal_peft.HyperAdaLoraConfig(hypernet="direct", task_type=task)
    )
    assert model.modules_to_save is None
    assert all("hal_adapters" in n for n, p in model.named_parameters() if p.requires_grad)


def test_other_modules_to_save():
    """A list says all that is meant, without a task; with one, the head comes with it."""
    bert = zoo.BY_NAME["bert"]
    head, other = "classifier", "pooler"
    for task, given, expected in (
        (None, None, {head}), (None, [], set()), (None, [other], {other}),
        ("SEQ_CLS", [other], {head, other}),
    ):  # fmt: skip
        model = bert.adapted(task_type=task, modules_to_save=given)
        saved = model.base_model.saved_modules("default")
        assert {name.rpartition(".")[2] for name in saved} == expected
        targets = model.base_model.targeted_module_names
        assert ("classifier" in targets) == (head not in expected)
        assert ("bert.pooler.dense" in targets) == (other not in expected)


def test_a_head_that_is_targeted_by_its_whole_name():
    """It is adapted then, as asked for."""
    vit = zoo.BY_NAME["vit"]
    for targets in (["classifier", "q_proj"], r"classifier|vit\.layers\.0\.attention\.q_proj"):
        model = vit.adapted(target_modules=targets, modules_to_save=None)
        assert "classifier" in model.base_model.targeted_module_names
        assert model.modules_to_save is None


class Named(zoo.Wired):
    """No transformers model; PEFT wraps whatever name ends in "classifier"."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_classifier = nn.Sequential(nn.Linear(16, 16))
        self.classifier = self.head
        del self.head

    def forward(self, x, labels=None):
        logits = self.classifier(self.pre_classifier(x))
        return {"loss": logits.square().mean(), "logits": logits}


@pytest.mark.parametrize("task", [None, "TOKEN_CLS"])
def test_what_is_saved_is_not_adapted(task):
    """By PEFT's rule for what it saves, endings of names, not by its rule for what it adapts."""
    model = Named()
    model.body = nn.Linear(16, 16)
    saved = None if task else ["classifier"]
    config = hal_peft.HyperAdaLoraConfig(hypernet="direct", modules_to_save=saved, task_type=task)
    model = peft.get_peft_model(model, config)
    assert model.base_model.targeted_module_names == ["body"]
    assert set(model.base_model.saved_modules("default")) == {"pre_classifier", "classifier"}
