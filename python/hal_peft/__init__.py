"""The Hugging Face side of hal_kernels: PEFT, Trainer and accelerate.

    import hal_peft
    model = peft.get_peft_model(model, hal_peft.HyperAdaLoraConfig(r=3))

Needs the ``hf`` extra (transformers, accelerate, peft); ``hal_kernels`` itself needs none of them.
Importing this package registers the method with PEFT (docs/peft.md).
"""

from .adalora import export_adalora, load_adalora
from .config import HyperAdaLoraConfig
from .model import HyperAdaLoraModel
from .register import register

register()

__all__ = ["HyperAdaLoraConfig", "HyperAdaLoraModel", "export_adalora", "load_adalora"]
