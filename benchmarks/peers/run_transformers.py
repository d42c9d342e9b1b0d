"""An OpenVLA built from transformers modules as a contestant.

    run_transformers.py ARTIFACT OBSERVATION.npz THREADS DTYPE [compile]

Uses SiglipVisionModel, linear layers as projector, and LlamaModel with the artifact's weights. Actions are decoded
greedily, token by token, with transformers' key-value cache.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from protocol import Opened, observation, serve


def main() -> Opened:
    import torch
    import transformers
    from openvla_in_transformers import TransformersOpenVLA

    folder, inputs, threads = Path(sys.argv[1]), observation(sys.argv[2]), int(sys.argv[3])
    dtype, compiled = getattr(torch, sys.argv[4]), "compile" in sys.argv[5:]
    torch.set_num_threads(threads)
    policy: Any = TransformersOpenVLA(folder, dtype)
    if compiled:
        torch._inductor.config.freezing = True  # allows torch to pack the constant weights once
        policy.encode_image, policy.step = torch.compile(policy.encode_image), torch.compile(policy.step, dynamic=True)

    def infer() -> Any:
        with torch.inference_mode():
            return policy.infer(inputs)

    precision = f"{sys.argv[4]}, {'torch.compile' if compiled else 'eager'}"
    return Opened(infer, precision, f"transformers {transformers.__version__}, torch {torch.__version__}")


serve(main)
