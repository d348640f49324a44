"""What is trained in full beside the adapter: task heads, and what a checkpoint did not bring."""

import models
import pytest
import torch
from lifecycle import predict, unchanged
from training import train, trainable

import hal_kernels
from hal_kernels.targets import saved_module_names

hf = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 40, "initializer_range": 0.1,
    "hidden_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "distilbert": hf.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=40,
        initializer_range=0.1, dropout=0.0, seq_classif_dropout=0.0,
    ),
    "bert": hf.BertConfig(**SMALL),
    "roberta": hf.RobertaConfig(**SMALL),
    "deberta": hf.DebertaV2Config(**SMALL, pooler_hidden_size=32, pooler_dropout=0.0),
    "electra": hf.ElectraConfig(**SMALL, embedding_size=32),
    "bart": hf.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, init_std=0.1,
    ),
    "xlnet": hf.XLNetConfig(
        vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=48, dropout=0.0,
        summary_last_dropout=0.0,
    ),
    "gpt2": hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=40, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama": hf.LlamaConfig(**{k: v for k, v in SMALL.items() if "prob" not in k}),
    "t5": hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2, dropout_rate=0.0,
        classifier_dropout=0.0, decoder_start_token_id=0, eos_token_id=2,
    ),
}  # fmt: skip
HEADS = {
    "distilbert": ["pre_classifier", "classifier"], "deberta": ["pooler", "classifier"],
    "bart": ["classification_head"], "t5": ["classification_head"],
    "xlnet": ["sequence_summary", "logits_proj"], "gpt2": ["score"], "llama": ["score"],
}  # fmt: skip


@pytest.fixture
def base(request, tmp_path):
    """A folder with a pretrained model that has no head."""
    torch.manual_seed(0)
    hf.AutoModel.from_config(CONFIGS[request.param]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(folder, seed, kind=hf.AutoModelForSequenceClassification):
    torch.manual_seed(seed)
    return kind.from_pretrained(folder, num_labels=models.CLASSES).train()


def inputs(seed=0):
    tokens = torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(seed))
    tokens[:, -1] = 2  # BART reads its sentences at this one
    return {"input_ids": tokens, "labels": torch.arange(4) % models.CLASSES}


@pytest.mark.parametrize("base", CONFIGS, indirect=True)
def test_a_new_head_is_trained_and_saved(base, tmp_path, request):
    """Loaded again with other random values in the head, the model computes the same."""
    model = classifier(base, seed=1)
    hal_kernels.patch_model(model, 2, hypernet="direct", seed=0)
    name = request.node.callspec.params["base"]
    assert list(model.hal.saved_modules) == HEADS.get(name, ["classifier"])
    train(model, torch.optim.AdamW(trainable(model), lr=1e-2), [inputs(i) for i in range(3)])
    hal_kernels.save_adapter(model, tmp_path / "adapter")
    again = classifier(base, seed=2)
    assert not torch.allclose(predict(again, **inputs()), predict(model, **inputs()), atol=1e-3)
    hal_kernels.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(predict(again, **inputs()), predict(model, **inputs()))


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_of_a_model_that_no_checkpoint_made(name):
    model = hf.AutoModelForSequenceClassification.from_config(CONFIGS[name])
    found = saved_module_names(model, hal_kernels.HALConfig())
    assert found == HEADS.get(name, ["classifier"])


@pytest.mark.parametrize(("name", "kind", "expected"), [
    ("llama", hf.AutoModelForCausalLM, []),
    ("bert", hf.AutoModelForMaskedLM, []),
    ("t5", hf.AutoModelForSeq2SeqLM, []),
    ("bert", hf.AutoModelForQuestionAnswering, ["qa_outputs"]),
    ("roberta", hf.AutoModelForTokenClassification, ["classifier"]),
    ("electra", hf.AutoModelForMultipleChoice, ["sequence_summary", "classifier"]),
    ("bert", hf.AutoModel, []),
])  # fmt: skip
def test_a_language_models_head_comes_with_its_checkpoint(name, kind, expected, tmp_path):
    made = kind.from_config(CONFIGS[name])
    assert saved_module_names(made, hal_kernels.HALConfig()) == expected
    made.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert saved_module_names(loaded, hal_kernels.HALConfig()) == expected


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_what_is_new_inside_is_trained_too(base):
    """A pooler that the checkpoint lacks, say, or a module that the user added."""
    model = classifier(base, seed=1)
    model.bert.extra = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    hal_kernels.patch_model(model, 2, hypernet="direct")
    assert list(model.hal.saved_modules) == ["bert.extra", "classifier"]


@pytest.mark.parametrize("base", ["distilbert"], indirect=True)
def test_a_new_head_that_is_left_out_is_told_of(base):
    """A list of names is taken as it is."""
    model = classifier(base, seed=1)
    message = r"pre_classifier\.weight, pre_classifier\.bias: .* neither trained nor saved"
    with pytest.warns(UserWarning, match=message):
        hal_kernels.patch_model(model, 2, hypernet="direct", modules_to_save=["classifier"])
    other = classifier(base, seed=1)
    other.register_parameter("lone", torch.nn.Parameter(torch.randn(3)))
    with unchanged(other), pytest.raises(UserWarning, match=r"lone: not in the checkpoint"):
        hal_kernels.patch_model(other, 2, hypernet="direct")


@pytest.mark.parametrize("base", ["bert"], indirect=True)
def test_new_embeddings_are_told_of(base):
    """They are too large to be trained unasked, and new where the vocabulary was extended."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(
        base, vocab_size=80, num_labels=models.CLASSES, ignore_mismatched_sizes=True
    )
    with pytest.warns(UserWarning, match=r"word_embeddings\.weight: not in the checkpoint"):
        hal_kernels.patch_model(model, 2, hypernet="direct")
    assert list(model.hal.saved_modules) == ["classifier"]


def test_what_the_user_trains_besides_is_told_of_when_it_is_not_saved(tmp_path):
    model = hal_kernels.patch_model(models.bert(), 2, hypernet="direct")
    model.bert.embeddings.LayerNorm.requires_grad_(True)
    message = r"embeddings\.LayerNorm\.weight, .*LayerNorm\.bias: trained, and not saved"
    with pytest.warns(UserWarning, match=message):
        hal_kernels.save_adapter(model, tmp_path)
