"""Python imports this file at its start. It spares SGLang's load tool two modules for images, which need torchvision.

No check here sends an image. The wheels of torchvision on PyPI need CUDA's libraries, so they cannot be imported beside
a PyTorch without CUDA.
"""

import sys
from types import ModuleType


class ForImages(ModuleType):
    """Has an empty class for every name that is imported from it."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"model_type": name.lower()})


for name in ("sglang.srt.multimodal.internvl_utils", "sglang.srt.configs.deepseek_ocr"):
    sys.modules[name] = ForImages(name)
