"""The Hugging Face side of hal_kernels: PEFT, Trainer and accelerate.

Needs the ``hf`` extra (transformers, accelerate, peft); ``hal_kernels`` itself needs none of them.
"""
