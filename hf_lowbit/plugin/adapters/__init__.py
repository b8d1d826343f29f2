"""Adapters of PEFT on low-bit layers: LoRA, DoRA and MiSS (Bone), ways to start them, ways to merge them.

``peft.get_peft_model``, ``PeftModel.from_pretrained`` and ``model.load_adapter`` work as on dense models; nothing of ours
has to be called. :func:`adapt` starts an adapter from the original weights, :func:`merge_checkpoint` merges a saved one.
PEFT is imported when one of them is called, or by the user: ``pip install "hf-lowbit[peft]"``.
"""

from hf_lowbit.plugin.adapters.merge import merge_checkpoint
from hf_lowbit.plugin.adapters.start import adapt

__all__ = ["adapt", "merge_checkpoint"]
