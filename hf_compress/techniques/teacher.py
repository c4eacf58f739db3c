"""Teachers: from a folder or the Hub, in 8 or 4 bits, given as a model, or the base under a LoRA student."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from hf_compress.bnb_guard import disable_cpu_packing, unfit
from hf_compress.errors import CompressError
from hf_compress.families import expert_options
from hf_compress.heads import distribution, head_of
from hf_compress.source import local_path
from hf_compress.weights import base_of

if TYPE_CHECKING:
    from hf_compress.trainer import CompressionTrainer

# what a recipe may say of how a teacher is loaded: nothing that runs code or reads pickles, no tokens
OPTIONS = ("attn_implementation", "device_map", "dtype", "experts_implementation", "revision", "subfolder")
BASE = "base"
_AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "tokens": "AutoModelForTokenClassification",
    "sequence": "AutoModelForSequenceClassification",
}


def load_teacher(given: Any, student: nn.Module, *, init: dict[str, Any], bits: int | None) -> nn.Module:
    """The teacher, in eval mode, its parameters frozen. given: a name or path (package:// too), ``base``, or a model.

    Raises:
        CompressError: `base` without adapters; the student itself; a folder or repository that holds no such model,
        or only part of its weights; a head that answers another question than the student's.
    """
    if given == BASE:
        if not hasattr(student, "disable_adapter"):
            raise CompressError(
                "`base` is the model under a LoRA student, and this student has no adapters",
                where="distill.teacher_model",
                next_step="peft_config=LoraConfig(...), `lora: {r: 16}` in a recipe, or name another teacher",
            )
        return student
    if isinstance(given, str):
        try:
            teacher: nn.Module = _read(local_path(given), head_of(base_of(student)), init, bits)
        except (OSError, ValueError) as error:
            raise CompressError(
                f"cannot read the teacher: {str(error).splitlines()[0]}",
                where=f"distill.teacher_model {given!r}",
                next_step="a folder or Hub id of a model with the student's kind of head, in safetensors; `dense` and "
                "stages are known inside a recipe only",
            ) from error
        disable_cpu_packing(teacher)
    elif base_of(given) is base_of(student):
        raise CompressError(
            "the teacher is the student itself, and would be frozen",
            where="distill.teacher_model",
            next_step="copy.deepcopy(model), the folder it came from, or `base` under adapters",
        )
    else:
        teacher = given
    _check_head(base_of(student), base_of(teacher))
    return teacher.eval().requires_grad_(False)


def _read(name: str, kind: str, init: dict[str, Any], bits: int | None) -> Any:
    auto = getattr(transformers, _AUTO[kind])
    place = {key: value for key, value in init.items() if key in ("revision", "subfolder")}
    config = AutoConfig.from_pretrained(name, **place, trust_remote_code=False)
    options = expert_options(config) | init
    if bits is not None:
        with torch.device("meta"):
            shapes = auto.from_config(config)
        linear = [(n, m) for n, m in shapes.named_modules() if isinstance(m, nn.Linear)]
        head = shapes.get_output_embeddings()
        heads = [n for n, m in linear if m is head or not n.startswith(shapes.base_model_prefix + ".")]
        keep = [n for n, m in linear if unfit(n, m.in_features, bits=bits)]
        packing: dict[str, Any] = {"load_in_8bit": True}
        if bits == 4:
            dtype = init.get("dtype", config.dtype)
            dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto" is no dtype
            packing = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        options["quantization_config"] = BitsAndBytesConfig(llm_int8_skip_modules=sorted({*heads, *keep}), **packing)
    teacher, info = auto.from_pretrained(
        name, **options, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if info["missing_keys"]:  # made at random, and what they say would be learned
        raise CompressError(
            f"the teacher lacks weights of a {type(teacher).__name__}: {', '.join(sorted(info['missing_keys'])[:3])}",
            where=f"distill.teacher_model {name!r}",
            next_step="use a teacher with the student's kind of head",
        )
    return teacher


def _check_head(student: Any, teacher: Any) -> None:
    ours, theirs = head_of(student), head_of(teacher)
    if ours != theirs or distribution(student) != distribution(teacher):
        raise CompressError(
            f"the teacher is a {type(teacher).__name__} ({distribution(teacher)}), the student a "
            f"{type(student).__name__} ({distribution(student)}): their outputs do not mean the same",
            where="distill.teacher_model",
            next_step="use a teacher with the student's kind of head",
        )
    if ours in ("tokens", "sequence") and teacher.config.num_labels != student.config.num_labels:
        raise CompressError(
            f"the teacher has {teacher.config.num_labels} labels, the student {student.config.num_labels}",
            where="distill.teacher_model",
            next_step="use a teacher with the student's labels",
        )


def check_vocabulary(trainer: CompressionTrainer, given: Any, teacher: nn.Module) -> None:
    """Raise a CompressError for a teacher of other tokens than the student's."""
    ours, theirs = trainer.processing_class, base_of(teacher).config.get_text_config()
    if isinstance(given, str) and ours is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(given)
        except (OSError, ValueError):
            tokenizer = None  # a teacher saved without its tokenizer: the sizes below are all there is to compare
        if tokenizer is not None and tokenizer.get_vocab() != ours.get_vocab():
            raise CompressError(
                "teacher and student have different tokenizers: their logits are not about the same tokens",
                where=f"distill.teacher_model {given!r}",
                next_step="use a teacher of the same tokenizer",
            )
    size = base_of(trainer.model).config.get_text_config().vocab_size
    smallest = len(ours) if ours is not None else max(size, theirs.vocab_size)
    if min(size, theirs.vocab_size) < smallest:
        raise CompressError(
            f"teacher vocabulary {theirs.vocab_size}, student {size}",
            where="distill.teacher_model",
            next_step="use a teacher of the same tokenizer",
        )


@contextmanager
def answering(teacher: nn.Module, *, base: bool) -> Iterator[None]:
    """Without gradients; of a LoRA student's base, without adapters and dropout."""
    with torch.no_grad():
        if not base:
            yield
            return
        training, adapted = teacher.training, cast(Any, teacher)
        with adapted.disable_adapter():
            teacher.eval()
            try:
                yield
            finally:
                teacher.train(training)


def as_classes(outputs: Tensor, kind: str) -> Tensor:
    """Outputs (rows, labels) as logits: of independent labels (`sigmoid`), two classes each, (rows * labels, 2)."""
    flat = outputs.flatten(0, -2)
    return torch.stack([flat, torch.zeros_like(flat)], -1).flatten(0, 1) if kind == "sigmoid" else flat
