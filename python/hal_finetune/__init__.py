"""The command ``hal-finetune``: fine-tune a model on a data set by one of five methods.

docs/finetune.md has its options. Needs the ``finetune`` extra.
"""
