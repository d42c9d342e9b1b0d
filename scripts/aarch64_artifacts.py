"""Export the artifacts to replay on 64-bit Arm: the reference policy and every family's golden checkpoint.

    python scripts/aarch64_artifacts.py FOLDER [onnx | gguf]

Precisions are fp32 and int4, and int8 for continuous actions. The committed int4 reference policy already has ONNX
graphs. GGUF uses int4 for continuous actions only: it rounds activations to 8 bits, so that two tokens with nearly
equal logits may swap between processors.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import DATA, FAMILIES, flags, official  # noqa: E402
from rlrc import artifact as artifacts  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig  # noqa: E402
from rlrc.compressor.stages import artifact_io, quantize  # noqa: E402
from rlrc.compressor.stages.sources import examples  # noqa: E402
from rlrc.compressor.stages.stage import StageOptions  # noqa: E402
from rlrc.exporters.export import export  # noqa: E402

IN_GGUF = ("openvla", "openvla-oft-l1", "openvla-oft-discrete")


def main(folder: Path, to: str = "onnx") -> None:
    """Export to ``folder``; the parents are in ``folder/weights``, which is not replayed."""
    export(artifacts.load(ROOT / "reference/dense"), folder / "reference-fp32", (to,), "fp32")
    if to == "onnx":
        (folder / "reference-int4").symlink_to(ROOT / "reference/compressed")
    for name in FAMILIES if to == "onnx" else IN_GGUF:
        weights = folder / "weights" / name
        source, policy = official(name)
        with artifacts.create_artifact(weights) as draft:
            source.copy_files(draft)
            artifact_io.write_policy(draft, policy, examples(policy.spec, source.tokenizer), (), exact=True)
        export(artifacts.load(weights), folder / f"{name}-fp32", (to,), "fp32")
        # No int8 for tokens: they flip where the machines' floats differ in the last bit.
        if to == "onnx" and not policy.spec.action.bins:
            export(artifacts.load(weights), folder / f"{name}-int8", (to,), "int8", tolerance=0.5)
        if to == "gguf" and policy.spec.action.bins:
            continue
        int4 = folder / "weights" / f"{name}-int4"
        quiet = StageOptions(evaluate=0, workers=1, threads=1)
        quantize.run_quantize(DATA / name / "checkpoint", int4, QuantizeConfig(), quiet, flags(name))
        export(artifacts.load(int4), folder / f"{name}-int4", (to,), "int4")
        print(f"exported {name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
