"""A lerobot policy as a contestant: run_lerobot.py CHECKPOINT OBSERVATION.npz THREADS DTYPE [compile].

Runs in a separate environment with lerobot[smolvla] (Python 3.12 or later); see docs/peers.md. lerobot's processors
prepare the observation and un-normalise the actions.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version

from protocol import Opened, observation, serve

os.environ["HF_HUB_OFFLINE"] = "1"  # the checkpoint is complete, so no download is needed


def main() -> Opened:
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    folder, inputs, threads = sys.argv[1], observation(sys.argv[2]), int(sys.argv[3])
    dtype, compiled = getattr(torch, sys.argv[4]), "compile" in sys.argv[5:]
    torch.set_num_threads(threads)
    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    config.compile_model, config.compile_mode = compiled, "default"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config).to(dtype).eval()
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    noise = torch.from_numpy(inputs["noise"])[None].to(dtype)

    def infer() -> torch.Tensor:
        raw = {
            f"observation.images.{name.removeprefix('image.')}": torch.from_numpy(value).permute(2, 0, 1) / 255
            for name, value in inputs.items()
            if name.startswith("image.")
        }
        raw |= {"observation.state": torch.from_numpy(inputs["state"]), "task": inputs["instruction"]}
        batch = before(raw)
        batch = {
            key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in batch.items()
        }
        with torch.inference_mode():
            return after(policy.predict_action_chunk(batch, noise=noise).float())[0]

    precision = f"{sys.argv[4]}, {'torch.compile' if compiled else 'eager'}"
    return Opened(infer, precision, f"lerobot {version('lerobot')}, torch {torch.__version__}")


serve(main)
