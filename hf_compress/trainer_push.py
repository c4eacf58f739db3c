"""How a CompressionTrainer reaches the Hub: with our card, verified at the end, without the optimizer's pickles."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from hf_compress.card import FACTS, save_facts, write_card
from hf_compress.errors import CompressError
from hf_compress.hub import Published, create, publish
from hf_compress.techniques.base import Technique
from hf_compress.trainer_facts import trainer_facts
from hf_compress.verification import write_expectation, write_hashes
from hf_compress.weights import base_of


class PublishingTrainer(Trainer):
    """What of transformers' Trainer goes to the Hub, as `hf_compress.hub.publish` does it."""

    model: Any
    hub_model_id: Any
    push_in_progress: Any
    techniques: Sequence[Technique]
    _trained: bool

    @property
    def _student(self) -> PreTrainedModel:
        return base_of(self.model)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.is_world_process_zero():
            repo = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = create(repo, private=bool(self.args.hub_private_repo if private is None else private))
        self.push_in_progress = None

    def create_model_card(
        self,
        *,
        model_name: str | None = None,
        license: str | None = None,
        dataset: str | list[str] | None = None,
        **_: Any,
    ) -> None:
        """Write our card and its facts into output_dir, from what this run did. Other arguments of the Trainer's own
        draft have no place in it."""
        if self.is_world_process_zero():
            write_trainer_card(self, model_name, license, dataset)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """Save, describe, verify and publish the model in one commit: a `hub.Published` (a Future of it when not
        `blocking`) on rank 0. card: as `create_model_card`.

        Raises:
            CompressError: a token was passed (log in instead); see `create_model_card` and `hf_compress.hub.publish`.
        """
        if token is not None:
            raise CompressError(
                "tokens are not passed around", where="push_to_hub(token=)", next_step="run `hf auth login`"
            )
        check_finished(self)  # before a repository is made
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        repo = self.hub_model_id
        assert repo is not None
        self.create_model_card(**({"model_name": repo.split("/")[-1]} | card))
        self._finish_current_push()
        private = self.args.hub_private_repo if private is None else private
        message, revision = commit_message or "End of training", revision or self.args.hub_revision
        return push_final(self, repo, message=message, revision=revision, private=private, blocking=blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        waiting = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if self.is_world_process_zero() and self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            if waiting and not self.args.hub_always_push:
                return  # the next one will carry this step's model too
            self._finish_current_push()
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            self.push_in_progress = push_step(self, Path(checkpoint_folder))


def check_arguments(args: TrainingArguments) -> None:
    """Raise a CompressError for what publishing from a Trainer does not do, before training."""
    if args.hub_token:
        raise CompressError(
            "a token in TrainingArguments ends up in files and logs",
            where="TrainingArguments.hub_token",
            next_step="leave it out and log in with `hf auth login`, or set HF_TOKEN",
        )
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise CompressError(
            "whole checkpoints are not published: the optimizer's state is a pickle",
            where="TrainingArguments.hub_strategy",
            next_step='use "end" or "every_save"; checkpoints stay in output_dir, where training resumes from',
        )


def check_finished(trainer: PublishingTrainer) -> None:
    """Raise a CompressError where training with techniques has not ended, or adapters are not merged."""
    if trainer.techniques and not trainer._trained:
        raise CompressError(
            "masks and fake quantization are still at work: what would be saved is not what answers now",
            where="push_to_hub()",
            next_step="call train() first",
        )
    if hasattr(trainer.model, "peft_config"):
        raise CompressError(
            "adapters alone are no compressed model",
            where="push_to_hub()",
            next_step="trainer.model = trainer.model.merge_and_unload(), then push",
        )


def write_trainer_card(trainer: PublishingTrainer, name: str | None, license: str | None, dataset: Any) -> None:
    """README.md and hf_compress.json of the model in output_dir, with what it answers now and hashes of its files.

    Raises:
        CompressError: as `check_finished`.
    """
    check_finished(trainer)
    folder = Path(trainer.args.output_dir)
    write_expectation(trainer._student, folder)
    datasets = [dataset] if isinstance(dataset, str) else dataset or []
    facts = trainer_facts(trainer, folder, name=name or folder.absolute().name, license=license, datasets=datasets)
    save_facts(facts, folder / FACTS)
    write_hashes(folder)
    write_card(folder)


def push_final(
    trainer: PublishingTrainer, repo: str, *, message: str, revision: str | None, private: bool | None, blocking: bool
) -> Any:
    """Verify output_dir and publish it: a `Published`, or a Future of one when not blocking."""
    arguments: dict[str, Any] = {
        "folder": trainer.args.output_dir,
        "repo": repo,
        "private": bool(private),
        "revision": revision,
        "message": message,
    }
    return publish(**arguments) if blocking else HfApi().run_as_future(publish, **arguments)


def push_step(trainer: PublishingTrainer, checkpoint: Path) -> PushInProgress:
    """Publish a checkpoint's model in the background, with a card that says training goes on; not verified.

    Its files are copied first, since the Trainer may delete the checkpoint meanwhile.
    """
    step = Path(trainer.args.output_dir) / "hub-step"
    shutil.rmtree(step, ignore_errors=True)
    step.mkdir(parents=True)
    for pattern in ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"):
        for file in checkpoint.glob(pattern):
            shutil.copyfile(file, step / file.name)
    repo = trainer.hub_model_id
    assert repo is not None
    facts = trainer_facts(trainer, step, name=repo.split("/")[-1], in_progress=True)
    save_facts(facts, step / FACTS)
    write_card(step, repo=repo)

    def push() -> Published:
        return publish(
            step,
            repo,
            private=bool(trainer.args.hub_private_repo),
            revision=trainer.args.hub_revision,
            message=f"Training in progress, step {facts['in_progress']}",
            check=False,
        )

    return PushInProgress([HfApi().run_as_future(push)])
