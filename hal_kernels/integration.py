"""For packages that attach adapters in their own way, as `hal_peft` does for PEFT.

`hal_kernels.patch_model` owns its adapter, finds its layers and writes its own checkpoints. A
package that does any of these itself, with layers or files of its own, builds on what is listed
here, under the names and with the meaning that each has where it is defined. Nothing else inside
`hal_kernels` is for use from outside.
"""

from .checks import INVALID, expect_finite, expect_mask, expect_tensors
from .compaction import compact_adapter
from .export import exact_targets, write_lora
from .files import folder_path, serialized, write_together
from .introspection import adapter_factors, adapter_rank_pattern, starting_rate
from .nn.adapter import HyperAdapter
from .nn.earlier import without_offsets, without_sketches
from .nn.layout import Layout
from .nn.linear import LayerSlot, adapted_class, linear_widths
from .nn.shared_input import SharedInput, find_groups
from .nn.state import LATER, saved_steps
from .nn.tensors import replace_data
from .patched import layers_of
from .patching import hook_forward, new_adapter
from .targets import saved_module_names, target_layers

# Grouped by purpose, not by the alphabet.
__all__ = [  # noqa: RUF022
    # which layers of a model are adapted, and which modules are trained in full
    "target_layers", "saved_module_names", "adapted_class", "linear_widths",
    # an adapter, its hooks into a model, and its layers' places in it
    "HyperAdapter", "Layout", "new_adapter", "hook_forward",
    "LayerSlot", "layers_of", "SharedInput", "find_groups",
    # what an adapter holds
    "adapter_factors", "adapter_rank_pattern", "compact_adapter", "replace_data",
    "starting_rate",
    # checkpoints: what their tensors must be, and files that a kill leaves whole
    "saved_steps", "LATER", "without_offsets", "without_sketches",
    "expect_tensors", "expect_finite", "expect_mask", "INVALID",
    "folder_path", "serialized", "write_together",
    # the adapter as LoRA
    "write_lora", "exact_targets",
]  # fmt: skip
