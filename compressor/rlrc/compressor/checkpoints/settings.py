"""Checks every key of the configuration files: it is used, has no effect on the actions, or is refused.

A key that a newer version of the training code added may change the computation, so a key that is not listed here is
refused, unless it is null or --hints lists it under "ignore". The lists: transformers 4.40 to 5.23 (PretrainedConfig,
LlamaConfig, GenerationConfig), openvla's configuration_prismatic.py and processing_prismatic.py, lerobot 0.3 to 0.6
(configs/policies.py and each family's configuration file).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions


@dataclass(frozen=True)
class Keys:
    """``known``: patterns of keys that are used or change no action. ``only``: the supported values of other keys."""

    known: frozenset[str]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __or__(self, other: Keys) -> Keys:
        return Keys(self.known | other.known, {**self.only, **other.only})


def _keys(text: str) -> frozenset[str]:
    return frozenset(text.split())


def check(values: Mapping[str, Any], keys: Keys, where: object, options: ReadOptions) -> None:
    """Raises UserError for an unknown key or an unsupported value."""
    ignored = options.hints.get("ignore") or []
    if not isinstance(ignored, list):
        raise UserError(f"expected a list of names of settings as the hint ignore, found {ignored!r:.80}; correct it")
    for key, value in values.items():
        if value is None or any(fnmatchcase(key, pattern) for pattern in keys.known):
            continue
        if key in ("quantization_config", "compression_config"):
            method = value.get("quant_method") if isinstance(value, Mapping) else value
            raise UserError(
                f"expected floating-point weights, found {key} of {method!r} in {where}: they are quantized; give the "
                "checkpoint that they were quantized from (rlrc quantize comes after)"
            )
        if key in keys.only:
            if value not in keys.only[key]:
                wanted = " or ".join(map(json.dumps, keys.only[key])) or "null"
                found = json.dumps(value)[:80]
                raise UserError(f"expected {key} to be {wanted} in {where}, found {found}; rlrc does not support it")
        elif key not in ignored:
            raise UserError(
                f"expected settings that rlrc knows in {where}, found {key} = {value!r:.80}; upgrade rlrc, or give "
                f'{{"ignore": ["{key}"]}} with --hints if it changes no action'
            )


# transformers: the keys of every configuration. Generation: the original code decodes greedily (do_sample=False), so
# settings of sampling have no effect; settings that change the logits do.
GENERATION = Keys(
    _keys(
        "_from_model_config transformers_version *_token_id do_sample temperature top_k top_p top_h min_p typical_p "
        "epsilon_cutoff eta_cutoff max_length max_new_tokens max_time early_stopping length_penalty use_cache "
        "cache_implementation cache_config max_cache_len num_return_sequences output_* return_dict* "
        "remove_invalid_values renormalize_logits disable_compile compile_config is_assistant num_assistant_* "
        "assistant_* prompt_lookup_num_tokens max_matching_ngram_size target_lookbehind token_healing low_memory "
        "prefill_chunk_size use_mtp speculation_type continuous_batching_config"
    ),
    {
        "num_beams": (1,),
        "num_beam_groups": (1,),
        "diversity_penalty": (0.0,),
        "repetition_penalty": (1.0,),
        "encoder_repetition_penalty": (1.0,),
        "no_repeat_ngram_size": (0,),
        "encoder_no_repeat_ngram_size": (0,),
        "min_length": (0,),
        "min_new_tokens": (0,),
        "guidance_scale": (1.0,),
        **dict.fromkeys(
            _keys(
                "bad_words_ids forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens "
                "exponential_decay_length_penalty sequence_bias constraints force_words_ids watermarking_config "
                "penalty_alpha dola_layers stop_strings"
            ),
            (),
        ),
    },
)
TRANSFORMERS = GENERATION | Keys(
    _keys(
        "_name_or_path _commit_hash _attn_implementation* attn_implementation architectures auto_map "
        "trust_remote_code torch_dtype dtype torchscript use_bfloat16 tf_legacy_loss finetuning_task id2label label2id "
        "num_labels problem_type task_specific_params tokenizer_class prefix model_type tie_encoder_decoder "
        "chunk_size_feed_forward"
    ),
    {
        "is_encoder_decoder": (False,),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "cross_attention_hidden_size": (),
        "pruned_heads": ({},),
    },
)
PRISMATIC = TRANSFORMERS | Keys(
    _keys(
        "vision_backbone_id llm_backbone_id hf_llm_id arch_specifier use_fused_vision_backbone timm_model_ids "
        "image_sizes image_resize_strategy llm_max_length pad_to_multiple_of output_projector_states text_config "
        "norm_stats n_action_bins tie_word_embeddings"
    ),
    {"timm_override_act_layers": ([None], [None, None])},
)
LLAMA = TRANSFORMERS | Keys(
    _keys(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings "
        # of training or of the cache, or with the same sums in another order
        "max_position_embeddings initializer_range attention_dropout pretraining_tp attention_bias"
    ),
    {
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "use_sliding_window": (False,),
        "sliding_window": (),
    },
)
IMAGE_PROCESSOR = Keys(
    _keys(
        "image_processor_type processor_class auto_map use_fused_vision_backbone image_resize_strategy input_sizes "
        "interpolations means stds tvf_resize_params tvf_crop_params tvf_normalize_params tvf_letterbox_fill "
        "_processor_class"
    ),
    {"tvf_do_letterbox": (False,)},
)

# lerobot: the keys of every policy's configuration; the processors read normalisation_mapping.
LEROBOT = Keys(
    _keys(
        "type input_features output_features normalization_mapping chunk_size n_action_steps device use_amp "
        "push_to_hub repo_id private tags license pretrained_path pretrained_revision optimizer_* scheduler_* "
        "action_feature_names auto_map trust_remote_code"
    ),
    {"n_obs_steps": (1,), "use_peft": (False,)},
)
ACT = LEROBOT | Keys(
    _keys(
        "vision_backbone replace_final_stride_with_dilation pre_norm dim_model n_heads dim_feedforward "
        "feedforward_activation n_encoder_layers n_decoder_layers "
        # of training, of the VAE, or of the caller
        "pretrained_backbone_weights use_vae latent_dim n_vae_encoder_layers dropout kl_weight temporal_ensemble_*"
    )
)
_FLOW = LEROBOT | Keys(
    _keys(
        "max_state_dim max_action_dim tokenizer_max_length min_period max_period "
        # empty cameras are never present; the rest is of training, of the device or of the caller
        "empty_cameras freeze_vision_encoder train_expert_only gradient_checkpointing compile_model compile_mode "
        "rtc_config"
    ),
    dict.fromkeys(("adapt_to_pi_aloha", "use_delta_joint_actions_aloha"), (False,)),
)
PI0 = _FLOW | Keys(
    _keys(
        "paligemma_variant action_expert_variant image_resolution num_inference_steps dtype time_sampling_* "
        "relative_exclude_joints"
    ),
    dict.fromkeys(("use_relative_actions", "use_visual_memory", "use_proprioceptive_memory"), (False,)),
)
SMOLVLA = _FLOW | Keys(
    _keys(
        "vlm_model_name resize_imgs_with_padding num_steps attention_mode num_vlm_layers num_expert_layers "
        "self_attn_every_n_layers use_cache load_vlm_weights train_state_proj fine_tune_vision_encoder "
        "vision_encoder_lr_multiplier prefix_length pad_language_to expert_width_multiplier"
    ),
    {"add_image_special_tokens": (False,)},
)
POLICIES = {"act": ACT, "pi0": PI0, "pi05": PI0, "smolvla": SMOLVLA}


def check_lerobot(folder: Folder, options: ReadOptions) -> None:
    """Checks config.json of a lerobot policy. Raises UserError as ``check``."""
    check(folder.config, POLICIES[str(folder.config["type"])], "config.json", options)


def check_no_prompt_state(folder: Folder, options: ReadOptions) -> None:
    """Raises UserError for ``ReadOptions.prompt_state`` with a policy whose prompt has no state."""
    if options.prompt_state is not None:
        family = folder.config.get("type") or folder.config.get("model_type")
        raise UserError(
            f"expected --prompt-state with pi0.5 only, found {options.prompt_state!r} for {family}; leave it out"
        )


def rope_theta(text: Mapping[str, Any], where: object) -> float:
    """The base of the rotary positions: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``.

    Raises UserError for scaled or partial rotary positions and for keys that contradict each other.
    """
    found = {"rope_theta": text.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        values = text.get(name) or {}
        rest = dict(values) if isinstance(values, Mapping) else {"rope_type": values}
        found[f"{name}.rope_theta"] = rest.pop("rope_theta", None)
        kinds = [rest.pop("rope_type", None), rest.pop("type", None)]
        more = {key: value for key, value in rest.items() if value is not None}
        unscaled = all(kind in (None, "default") for kind in kinds)
        if not unscaled or any(key not in ("factor", "partial_rotary_factor") or more[key] != 1 for key in more):
            raise UserError(
                f"expected a language model without {name} of another rope_type than default in {where}, found "
                f"{values!r:.100}; rlrc does not read it"
            )
    given = {name: value for name, value in found.items() if value is not None}
    value: float = next(iter(given.values()), 10_000.0)
    if any(other != value for other in given.values()):
        listed = " and ".join(f"{name} {value!r}" for name, value in given.items())
        raise UserError(f"expected one base of the rotary positions in {where}, found {listed}; correct config.json")
    return value
