"""An OpenVLA of transformers' modules as a contestant.

    run_transformers.py ARTIFACT OBSERVATION.npz THREADS DTYPE [compile]

SiglipVisionModel and LlamaForCausalLM with the artifact's weights, as somebody would put them together who has
transformers and nothing else; the projector between them is three linear layers. The actions come from greedy decoding
with transformers' own cache, one token after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from protocol import Opened, observation, serve


def main() -> Opened:
    import torch
    import transformers
    from openvla_in_transformers import Assembled

    folder, seen, threads = Path(sys.argv[1]), observation(sys.argv[2]), int(sys.argv[3])
    dtype, compiled = getattr(torch, sys.argv[4]), "compile" in sys.argv[5:]
    torch.set_num_threads(threads)
    policy: Any = Assembled(folder, dtype)
    if compiled:
        torch._inductor.config.freezing = True  # weights never change: they may be packed once
        policy.encode_image, policy.step = torch.compile(policy.encode_image), torch.compile(policy.step, dynamic=True)

    def infer() -> Any:
        with torch.inference_mode():
            return policy.infer(seen)

    told = f"{sys.argv[4]}, {'torch.compile' if compiled else 'eager'}"
    return Opened(infer, told, f"transformers {transformers.__version__}, torch {torch.__version__}")


serve(main)
