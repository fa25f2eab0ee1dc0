"""The dotted keys of a recipe, such as `alignments.0.tap`: what each means, near names, how to set and compare them."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from dic_repa.errors import UserError, did_you_mean
from dic_repa.limits import check_limit
from dic_repa.recipe.values import whole_number, write_yaml

if TYPE_CHECKING:
    from dic_repa.recipe import Recipe, SamplingRecipe

# What other tools call a key. A key of the same section is suggested before one of another section.
_ELSEWHERE = {
    "train": "trainer",
    "train.init_from": "pretrained pretrained_model init_weights init_checkpoint finetune_from load_from resume_from "
    "pretrained_model_name_or_path",
    "train.freeze": "frozen freeze_layers frozen_layers trainable",
    "train.lora": "peft adapter adapters",
    "train.lora.rank": "r lora_rank",
    "train.lora.alpha": "lora_alpha",
    "train.lora.targets": "target_modules",
    "train.lora.also": "modules_to_save",
    "train.steps": "max_steps num_steps n_steps total_steps max_train_steps iterations iters max_iters num_iterations "
    "epochs num_epochs max_epochs n_epochs num_train_epochs",
    "train.batch_size": "bs batch global_batch_size train_batch_size batchsize",
    "train.micro_batch": "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches grad_accum "
    "accumulation_steps micro_batch_size per_gpu_batch_size batch_gpu",
    "train.gradient_clip": "grad_clip max_grad_norm clip_grad clip_grad_norm gradient_clip_val gradient_clipping "
    "clip_norm",
    "train.ema_decay": "ema ema_rate ema_beta decay_rate",
    "train.ema_half_life": "ema_halflife ema_halflife_kimg ema_half_life_images halflife",
    "train.label_dropout": "class_dropout_prob class_dropout label_drop_prob cfg_prob cfg_dropout p_uncond",
    "train.precision": "amp mixed_precision fp16 bf16 dtype",
    "train.gradient_checkpointing": "activation_checkpointing grad_checkpointing checkpointing grad_ckpt",
    "train.tf32": "allow_tf32",
    "train.seed": "global_seed random_seed",
    "train.log_every": "logging_steps log_interval log_freq log_steps",
    "train.sample_every": "sample_interval sample_freq sample_steps_every",
    "train.checkpoint_every": "ckpt_every save_every save_steps save_interval checkpointing_steps save_freq",
    "train.keep_checkpoints": "checkpoints_total_limit save_total_limit save_top_k",
    "train.trackers": "report_to logger loggers",
    "train.sharding": "fsdp strategy",
    "optimizer.name": "optim optimizer_type",
    "optimizer.learning_rate": "lr base_lr max_lr peak_lr",
    "optimizer.betas": "adam_betas beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.weight_decay": "wd adam_weight_decay decay",
    "optimizer.decay_on": "no_decay no_weight_decay weight_decay_on decay_matrices",
    "optimizer.options": "momentum eps adam_epsilon nesterov",
    "schedule": "lr_schedule scheduler",
    "schedule.name": "lr_scheduler lr_scheduler_type lr_decay",
    "schedule.warmup_steps": "warmup num_warmup_steps lr_warmup_steps lr_warmup warmup_iters",
    "schedule.options": "min_lr final_lr end_lr decay_steps",
    "data.name": "dataset data_type",
    "data.path": "root data_dir data_path datapath dataset_path dataset_dir folder dir",
    "data.size": "image_size resolution img_size img_resolution latent_size",
    "data.autoencoder": "vae first_stage tokenizer",
    "latent.normalise": "normalize normalization normalisation latent_norm latents_scale latents_bias scaling_factor "
    "scale_factor statistics latents_mean latents_std",
    "data.options": "num_classes flip xflip hflip shift unlabelled labels",
    "data.workers": "num_workers n_workers dataloader_num_workers",
    "model.name": "arch architecture net network model_name",
    "model.width": "hidden_size dim base_channels model_channels embed_dim",
    "model.depths": "depth num_blocks num_layers layers",
    "objective.options": "path_type prediction prediction_type weighting time_sampling",
    "alignments.N.encoder": "enc_type encoder_type",
    "alignments.N.tap": "encoder_depth depth layer align_depth",
    "alignments.N.head_options": "projector_dim projector_embed_dim hidden",
    "alignments.N.weight": "proj_coeff lambda coeff",
    "alignments.N.manifold_weight": "w manifold_coeff",
    "sample.solver": "sampler sampling_method ode_method scheduler method",
    "sample.steps": "num_steps n_steps num_inference_steps num_sampling_steps sampling_steps nfe ddim_steps",
    "sample.batch_size": "bs batch per_proc_batch_size",
    "sample.num": "num_samples n_samples num_images num_fid_samples n",
    "sample.precision": "dtype mixed_precision amp",
    "sample.guidance.scale": "cfg cfg_scale guidance_scale w omega",
    "sample.guidance.interval": "guidance_interval cfg_interval guidance_low guidance_high",
    "sample.guidance.internal": "ig_scale ig internal_guidance",
    "sample.guidance.internal_interval": "ig_interval ig_guidance_low ig_guidance_high",
    "evaluate.metric": "metrics",
    "evaluate.reference": "ref ref_batch reference_batch",
    "evaluate.every": "eval_every eval_steps eval_interval",
}
REQUIRED = PydanticUndefined
_APART = {"description", "paper", "folders"}  # what changes nothing
MOST_MISTAKES = 5  # that are explained
ABSENT = "-"  # the key does not exist there: its section is null, or the list is shorter


@dataclass(frozen=True)
class Key:
    """One key: its dotted name, where N is any entry of a list; what it takes, in words; whether it has keys itself."""

    name: str
    description: str
    takes: str
    default: Any
    is_section: bool

    @property
    def default_text(self) -> str:
        """The default as a recipe would have it; '' of a section and of what must be given."""
        if self.default is REQUIRED or isinstance(self.default, BaseModel):
            return ""
        return self.default if isinstance(self.default, str) and self.default else json.dumps(self.default)


def list_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, Key]:
    """All keys of `schema` by their dotted names, a section before what is in it."""
    found: dict[str, Key] = {}
    properties = schema.model_json_schema()["properties"]
    for field, info in schema.model_fields.items():
        name, section = prefix + field, _section_of(info.annotation)
        default = info.get_default(call_default_factory=True)
        found[name] = Key(name, info.description or "", _takes(properties[field]), default, section is not None)
        if section:
            is_list = properties[field].get("type") == "array"
            found |= list_keys(section, f"{name}.N." if is_list else f"{name}.")
    return found


def find_keys(schema: type[BaseModel], dotted: str) -> list[Key]:
    """The key of that dotted name, such as train.steps, alignments.0.tap or alignments.tap, and those inside it.

    A UserError for an unknown key names the near ones.
    """
    known = list_keys(schema)
    wanted = _without_index(dotted)
    found = [key for name, key in known.items() if f"{_without_index(name)}.".startswith(f"{wanted}.")]
    if not found:
        inside = [name for name in known if name.startswith(dotted.partition(".")[0] + ".")]
        raise UserError(f"unknown key '{dotted}'{_meant(schema, dotted, inside or schema.model_fields)}")
    return found


def commented_yaml(recipe: BaseModel) -> str:
    """A recipe as YAML, all defaults included, with what each key means above it: still a valid recipe."""
    text = write_yaml(recipe.model_dump(mode="json"))
    known = {_without_index(name): key for name, key in list_keys(type(recipe)).items()}
    lines = text.splitlines()
    root = yaml.compose(text, yaml.SafeLoader)
    assert root is not None  # a recipe is never empty
    for line, column, dotted in reversed(list(_places(root))):
        if key := known.get(dotted):
            default = f" (default: {key.default_text})" if key.default_text else ""
            mark = " " * column + "# "
            meaning = f"{key.description}{default}"
            lines[line:line] = textwrap.wrap(meaning, 118, initial_indent=mark, subsequent_indent=mark)
    return "\n".join(lines) + "\n"


def _places(node: yaml.Node, dotted: str = "") -> Iterator[tuple[int, int, str]]:
    """Line, column and dotted name of each key below a node of YAML, from the top."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _places(entry, dotted)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{dotted}.{key.value}" if dotted else key.value
            yield key.start_mark.line, key.start_mark.column, name
            yield from _places(value, name)


def find_field(schema: type[BaseModel], dotted: str) -> FieldInfo:
    """The schema's own field of a dotted key that is known to be there."""
    *sections, last = dotted.split(".")
    return _section_at(schema, sections).model_fields[last]


def explain_mistakes(schema: type[BaseModel], mistakes: ValidationError) -> str:
    """The first of pydantic's errors in the words of a recipe."""
    errors = mistakes.errors()
    told = [explain_mistake(schema, error) for error in errors[:MOST_MISTAKES]]
    return "; ".join(told + [f"and {len(errors) - len(told)} more mistakes"] * (len(errors) > len(told)))


def explain_mistake(schema: type[BaseModel], error: ErrorDetails) -> str:
    """One of pydantic's errors in the words of a recipe: the key, and what it takes or the nearest key."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "no_such_attribute"):
        return (
            f"unknown key '{location}'{_meant(schema, location, _section_at(schema, error['loc'][:-1]).model_fields)}"
        )
    if error["type"] == "missing":
        return f"{location} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "value_error":
        return f"{location}: {message}" if location else message
    return f"{location} {message}, not {error['input']!r}"


def _meant(schema: type[BaseModel], dotted: str, near: Iterable[str]) -> str:
    """'; did you mean train.learning_rate?' of train.lr, by what other tools and other sections call it; else by the
    spelling of the `near` ones."""
    section, _, last = dotted.rpartition(".")
    name = last.lower().replace("-", "_")
    keys = [key for key, names in _ELSEWHERE.items() if name in names.split()]
    keys += [key for key in list_keys(schema) if key.rpartition(".")[2] == name and key not in keys]
    here = [key for key in keys if _without_index(key.rpartition(".")[0]) == _without_index(section)]
    keys = here or sorted(keys, key=lambda key: key.count("."))  # a section of its own before one in another
    return f"; did you mean {' or '.join(keys[:3])}?" if keys else did_you_mean(last if section else dotted, near)


def _without_index(dotted: str) -> str:
    return ".".join(part for part in dotted.split(".") if part != "N" and not _is_index(part))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as `list[AlignmentSection]` or `GridSection | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_section_of, typing.get_args(annotation))), None)


def _section_at(schema: type[BaseModel], location: Iterable[str | int]) -> type[BaseModel]:
    """The section at `location`, which is known to be there and may pass through lists and optional sections."""
    for key in location:
        if isinstance(key, str):
            section = _section_of(schema.model_fields[key].annotation)
            assert section is not None, key
            schema = section
    return schema


def _takes(schema: dict) -> str:
    """What a JSON schema asks for, in words: 'whole number from 1, or null'."""
    if "anyOf" in schema:
        return ", or ".join(map(_takes, schema["anyOf"]))
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_takes(schema['prefixItems'][0])}"
    if "$ref" in schema or "allOf" in schema:
        return "section"
    kind = schema.get("type", "")
    if kind == "array":
        return "list of sections" if "$ref" in schema["items"] else f"list: {_takes(schema['items'])}"
    words = {"integer": "whole number", "string": "text", "boolean": "true or false", "object": "mapping"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{word} {whole_number(schema[bound])}" for bound, word in bounds.items() if bound in schema]
    return " ".join([words.get(kind, kind) or "a name, or a mapping of name and arguments", *limits])


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts and lists of dicts by dotted keys: {'train.steps': 400000, 'alignments.0.tap': 'mid.3', ...}."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, inner in items:
        leaves |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return leaves or {prefix: value}


def differences(a: Recipe | SamplingRecipe, b: Recipe | SamplingRecipe) -> dict[str, tuple[Any, Any]]:
    """The keys in which two resolved recipes differ, with both values; not `description`, `paper` and `folders`."""
    ours, theirs = (flatten(r.model_dump(mode="json", exclude=_APART)) for r in (a, b))
    keys = {**ours, **theirs}
    pairs = {key: (ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def assign(raw: dict, dotted: str, value: Any, source: str) -> None:
    """Set one dotted key of a raw recipe; `source` is who asks for it."""
    *parents, last = dotted.split(".")
    check_limit("nesting", len(parents), f"{source}: the depth of its nesting")
    node: Any = raw
    for part in parents:
        if isinstance(node, dict) and node.get(part) is None:
            node[part] = {}  # a section that the recipe leaves to its defaults
        node = _child(node, part, f"{source} {dotted}")
    if isinstance(node, list):
        _child(node, last, f"{source} {dotted}")
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"{source} {dotted}: '{'.'.join(parents)}' has no keys of its own")


def _is_index(part: str) -> bool:
    return part.isdecimal() and len(part) < 10  # isdigit takes ², which int does not


def _child(node: Any, part: str, where: str) -> Any:
    if isinstance(node, list):
        if not _is_index(part) or int(part) >= len(node):
            raise UserError(f"{where}: there is no entry '{part}'; there are {len(node)}, counted from 0")
        return node[int(part)]
    if isinstance(node, dict):
        return node[part]
    raise UserError(f"{where}: '{part}' is not inside a section")
