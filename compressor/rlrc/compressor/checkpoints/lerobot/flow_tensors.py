"""The names of the tensors of pi0, pi0.5 and SmolVLA in lerobot's files."""

from __future__ import annotations

from dataclasses import dataclass

from rlrc.artifact import TowerSpec
from rlrc.compressor.checkpoints.layout import TensorOrigin
from rlrc.compressor.checkpoints.lerobot.buffers import BUFFER
from rlrc.compressor.checkpoints.tensors import BUFFERS
from rlrc.compressor.models.storage.tensors import Tensors, wrong_shape_error


@dataclass(frozen=True)
class Names:
    """Prefixes of a policy's parts, without lerobot's leading "model."."""

    vision: str
    projector: str
    decoder: str
    expert: str
    head: str  # of language; replaces an embedding that is not stored


PALIGEMMA = Names(
    vision="paligemma_with_expert.paligemma.model.vision_tower.vision_model",
    projector="paligemma_with_expert.paligemma.model.multi_modal_projector.linear",
    decoder="paligemma_with_expert.paligemma.model.language_model",
    expert="paligemma_with_expert.gemma_expert.model",
    head="paligemma_with_expert.paligemma.lm_head.weight",
)
SMOLVLM = Names(
    vision="vlm_with_expert.vlm.model.vision_model",
    projector="vlm_with_expert.vlm.model.connector.modality_projection.proj",
    decoder="vlm_with_expert.vlm.model.text_model",
    expert="vlm_with_expert.lm_expert",
    head="vlm_with_expert.vlm.lm_head.weight",
)
NAMES = {"pi0": PALIGEMMA, "pi05": PALIGEMMA, "smolvla": SMOLVLM}

# Within a block: ours -> theirs.
VISION = {"attention.out": "self_attn.out_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
VISION |= {"norm1": "layer_norm1", "norm2": "layer_norm2"}
NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
LINEARS = {f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
LINEARS |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
HALF = ("norm1", "attention.k", "attention.v")  # the tensors of a "half" block


class CanonicalTensors:
    """A folder's tensors by names that do not depend on the program that saved them.

    Files derived from openpi have no leading "model.", compiled ones have an "_orig_mod", and files of pi0 and pi0.5
    may swap their names of the time MLP.
    """

    def __init__(self, tensors: Tensors, family: str) -> None:
        self.tensors, self.where = tensors, NAMES[family]
        self.names = {_canonical(name): name for name in tensors}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def name(self, name: str) -> str:
        """The stored name; for a missing tensor the name in lerobot."""
        return self.names.get(name, f"model.{name}")

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """Raises UserError if the tensor is missing or has another number of dimensions."""
        shape = self.tensors.shape(self.name(name))
        if len(shape) != dimensions:
            raise wrong_shape_error(f"tensor {self.name(name)}", f"{dimensions} dimensions", shape, self.tensors.origin)
        return shape

    def depth(self, layers: str, first: str) -> int:
        """The number of blocks ``layers``.0, ``layers``.1, ...; every block has a tensor ``first``."""
        self.shape(f"{layers}.0.{first}", 2)
        return self.tensors.depth(self.name(f"{layers}.0.{first}").removesuffix(f"0.{first}"))

    @property
    def embedding(self) -> str:
        """The embedding. Current files also have the language model's head, maybe stale; others have only the head."""
        stored = f"{self.where.decoder}.embed_tokens.weight"
        return self.where.head if stored not in self and self.where.head in self else stored


def _canonical(name: str) -> str:
    return name.replace("_orig_mod.", "").removeprefix("model.").replace("action_time_mlp_", "time_mlp_", 1)


def map_tensors(
    tensors: CanonicalTensors, towers: dict[str, TowerSpec], bias: bool, state: bool
) -> dict[str, TensorOrigin]:
    """The origins by the policy's names. ``bias``: the projector has one; ``state``: the state has a token."""
    where, found = tensors.where, dict[str, TensorOrigin]()

    def take(ours: str, *theirs: str, convert: str = "same") -> None:
        found[ours] = TensorOrigin(tuple(map(tensors.name, theirs)), convert)

    def affine(ours: str, theirs: str) -> None:
        for leaf in ("weight", "bias"):
            take(f"{ours}.{leaf}", f"{theirs}.{leaf}")

    def norm(ours: str, theirs: str, tower: TowerSpec) -> None:
        if tower.norm == "adaptive":
            affine(f"{ours}.dense", f"{theirs}.dense")
        else:
            take(f"{ours}.weight", f"{theirs}.weight")

    take("vision.stem.steps.0.weight", f"{where.vision}.embeddings.patch_embedding.weight", convert="patches")
    take("vision.stem.steps.0.bias", f"{where.vision}.embeddings.patch_embedding.bias")
    take("vision.position", f"{where.vision}.embeddings.position_embedding.weight")
    for i in range(len(towers["vision"].layers)):
        ours, theirs = f"vision.layers.{i}", f"{where.vision}.encoder.layers.{i}"
        for leaf in ("weight", "bias"):
            three = (f"{theirs}.self_attn.{name}_proj.{leaf}" for name in "qkv")
            take(f"{ours}.attention.qkv.{leaf}", *three, convert="join")
        for name, other in VISION.items():
            affine(f"{ours}.{name}", f"{theirs}.{other}")
    affine("vision.norm", f"{where.vision}.post_layernorm")
    take("projector.weight", f"{where.projector}.weight")
    if bias:
        take("projector.bias", f"{where.projector}.bias")
    take("embedding.weight", tensors.embedding)

    for name, prefix in (("decoder", where.decoder), ("expert", where.expert)):
        tower = towers[name]
        for i, layer in enumerate(tower.layers):
            ours, theirs = f"{name}.layers.{i}", f"{prefix}.layers.{i}"
            for inner, other in NORMS.items():
                if not layer.kv_only or inner in HALF:
                    norm(f"{ours}.{inner}", f"{theirs}.{other}", tower)
            for inner, other in LINEARS.items():
                if not layer.kv_only or inner in HALF:
                    take(f"{ours}.{inner}.weight", f"{theirs}.{other}.weight")
        if not tower.layers[-1].kv_only:
            norm(f"{name}.norm", f"{prefix}.norm", tower)

    affine("action_in", "action_in_proj")
    affine("action_out", "action_out_proj")
    affine("time_in", "time_mlp_in")
    affine("time_out", "time_mlp_out")
    if state:
        affine("state", "state_proj")
    return found


def find_unused(
    tensors: CanonicalTensors, towers: dict[str, TowerSpec], taken: dict[str, TensorOrigin]
) -> tuple[str, ...]:
    """Tensors that no action depends on: heads, the rest of the prefix's last blocks, statistics of old folders."""
    where, used = tensors.where, {name for origin in taken.values() for name in origin.names}
    begins = [f"{where.decoder}.norm.", f"{where.vision}.head.", f"{where.expert}.embed_tokens."]
    last = len(towers["decoder"].layers) - 1
    while f"{where.decoder}.layers.{last}.{LINEARS['attention.q']}.weight" in tensors:
        begins.append(f"{where.decoder}.layers.{last}.")
        last += 1
    if towers["expert"].norm == "adaptive":  # files may still have pi0's tensors
        begins += ["state_proj.", f"{where.expert}.norm.weight"]
        for i in range(len(towers["expert"].layers)):
            begins += [f"{where.expert}.layers.{i}.{theirs}.weight" for theirs in NORMS.values()]
    ends = ("lm_head.weight", *BUFFERS)
    return tuple(
        stored
        for plain, stored in tensors.names.items()
        if stored not in used and (plain.startswith(tuple(begins)) or plain.endswith(ends) or BUFFER.fullmatch(plain))
    )
